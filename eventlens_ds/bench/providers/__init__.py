"""The implementations that are compared: ours on every backend, and the strongest public formulations of each op."""
