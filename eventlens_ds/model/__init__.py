"""The model: configuration, parts, weights, initial values, stages.

Importing this package registers RegionVLM with transformers' Auto classes (model/auto.py) and its adapters with PEFT
(model/peft_moa.py, as far as the version of PEFT allows it), and does nothing else.
"""

from eventlens_ds.model.auto import register

register()
