"""Makes transformers' Auto classes know RegionVLM: AutoConfig, AutoModel and AutoProcessor load a
saved folder by its model_type; and PEFT know the adapters as a type of its own.

In: nothing. Out: registrations of whole models and of what `eventlens export --peft` writes, made once on
`import eventlens_ds.model`. Decision: registration is the only effect of the import, so an exported folder needs no
remote code to load.
"""

from __future__ import annotations

import logging

from transformers import AutoConfig, AutoModel

from eventlens_ds.model import processing
from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.peft_folder import RegionVLMFromPeft, RegionVLMPeftConfig
from eventlens_ds.model.region_vlm import RegionVLM

log = logging.getLogger(__name__)


def register() -> None:
    """Idempotent. Another version of PEFT may lack what the adapters' type needs: the models are registered without."""
    AutoConfig.register(RegionVLMConfig.model_type, RegionVLMConfig, exist_ok=True)
    AutoModel.register(RegionVLMConfig, RegionVLM, exist_ok=True)
    AutoConfig.register(RegionVLMPeftConfig.model_type, RegionVLMPeftConfig, exist_ok=True)
    AutoModel.register(RegionVLMPeftConfig, RegionVLMFromPeft, exist_ok=True)  # type: ignore[arg-type]  # a factory
    processing.register()
    try:
        from eventlens_ds.model import peft_moa

        problem = peft_moa.register()
    except ImportError as error:
        problem = str(error)
    if problem:
        log.info("PEFT does not know the adapters: %s", problem)
