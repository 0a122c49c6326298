"""How good the files in `weights/` are, on held-out prompts and scenes: each module prints tables of the model card.

    python -m training.measure.shipped      autoencoder, prompts, and the EasyControl adapters
    python -m training.measure.try_on       the try-on LoRAs, at 20 steps and at few
    python -m training.measure.in_context   the In-Context LoRA, by ComfyUI's nodes
    python -m training.measure.freecus      FreeCus, which has no weights, on the base
    python -m training.measure.dit4sr       the SD3.5 base, and DiT4SR on it
    python -m training.measure.dynamictrl   the CogVideoX base, and DynamiCtrl on it

Pictures are judged by `training.score`, from the world's definition and without a model. The tests use the same one.
"""
