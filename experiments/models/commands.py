"""The commands of ``python -m experiments.models``: list, generate, transcribe, classify and check."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from experiments.common.command_line import keep_compilations, parse, refusals, show
from experiments.common.settings import at_least
from experiments.common.settings import check as check_settings
from experiments.models import check
from experiments.models.check import Check
from jtl import heads, pretrained, tasks
from jtl._wheels import folder_of
from jtl.data import image
from jtl.data.encode import spectrograms
from jtl.data.readers.sound import RATE, read_any, resample
from jtl.errors import InputError
from jtl.model import Model
from jtl.models import ARCHITECTURES
from jtl.models.architecture import Architecture
from jtl.models.imagenet import imagenet_classes
from jtl.pretrained.load import find_architecture
from jtl.pretrained.sources import SHORT_NAMES, read_config


@dataclass(frozen=True)
class List:
    """The architectures and the short names that there are."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text; where the tokenizer has a chat template, answer it as a user's message."""

    prompt: tyro.conf.Positional[str]
    """The text."""
    model: str = "smollm2"
    """A language model: a short name, folder or hub id."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the most probable token; above 0, tokens are sampled."""
    top_k: int | None = None
    """Sample among so many of the most probable tokens."""
    top_p: float | None = None
    """Sample among the most probable tokens that have this much probability together."""
    seed: int = 0
    """Random seed of sampling."""
    raw: bool = False
    """Continue the text as it stands, without the chat template."""


@dataclass(frozen=True, kw_only=True)
class Transcribe:
    """Transcribe a WAV file of any sampling rate and length."""

    file: tyro.conf.Positional[Path]
    """The file."""
    model: str = "whisper-base"
    """A Whisper: a short name, folder or hub id."""
    language: str | None = None
    """Its code, such as en; left out, it is detected."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """Transcribe in the language that is spoken, or translate into English."""
    timestamps: bool = False
    """Print the times of each segment."""


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Classify an image."""

    file: tyro.conf.Positional[Path]
    """The image."""
    model: str = "efficientnet-lite0"
    """An image classifier: a short name, folder or hub id."""
    top: int = at_least(1, 5)
    """How many classes."""


COMMANDS: Any = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Transcribe, tyro.conf.subcommand("transcribe")]
    | Annotated[Classify, tyro.conf.subcommand("classify")]
)


def main(args: Sequence[str] | None = None) -> None:
    """Do what the command line says: the words ``args``, or those of the process."""
    settings: Any = parse(COMMANDS, __name__, args)
    keep_compilations()
    with refusals():
        check_settings(settings)
        if isinstance(settings, List):
            show_list()
        elif isinstance(settings, Check):
            result = check.run(settings)
            show(result, settings.out)
            if failed := check.failures(result.rows, settings.tolerance):
                print(*failed, sep="\n", file=sys.stderr)
                raise SystemExit(1)
        elif isinstance(settings, Generate):
            for piece in generate(settings):
                print(piece, end="", flush=True)
            print()
        else:
            print(transcribe(settings) if isinstance(settings, Transcribe) else classify(settings))


def show_list() -> None:
    """Print two tables: architectures with their inputs and paper, and the short names."""
    from rich.console import Console

    console = Console()
    known = _table("Architectures: from a folder or the hub", "model_type", "class", "reads", "paper")
    for name, architecture in ARCHITECTURES.items():
        fields = [field for field in architecture.example(architecture.config()) if field != "attention_mask"]
        known.add_row(name, architecture.base_class, " ".join(fields), paper(architecture))
    console.print(known)
    short = _table("Short names: from the registry", "name", "model_type", "what it is", "licence", "fetched")
    for name, entry in SHORT_NAMES.items():
        folder = folder_of((entry.wheel, *entry.more))
        here = folder.is_dir()
        settings = read_config(name, folder / entry.folder) if here else entry.config
        kind = settings.get("model_type", "")
        short.add_row(name, kind, entry.wheel.origin, entry.wheel.licence, "yes" if here else "no")
    console.print(short)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def paper(architecture: Architecture) -> str:
    """The last paper behind the architecture's name in the docstring of its file; if none is, the first paper."""
    text = sys.modules[architecture.module.__module__].__doc__ or ""
    links = list(re.finditer(r"https://[^\s,;)]*[^\s,;).]", text))
    starts = [0, *(link.end() for link in links)]
    plain = [re.sub(r"\W|_", "", text[a : b.start()].lower()) for a, b in zip(starts, links, strict=False)]
    name = re.sub(r"\W|_", "", architecture.name) + r"(?!v\d)"  # ConvNeXt V2 is not ConvNeXt
    named = [link for words, link in zip(plain, links, strict=True) if re.search(name, words)]
    found = (named or links)[-1 if named else 0].group()
    return found.replace("https://arxiv.org/abs/", "arXiv ")


def loaded(name: str, field: str) -> tuple[Model, tuple[str, ...]]:
    """A pretrained model that reads ``field``, and the names of all its inputs.

    Raises:
        InputError: the model does not read ``field``.
    """
    model = pretrained.load(name)
    fields = tuple(find_architecture(model.config.model_type).example(model.config))
    if field not in fields:
        raise InputError(
            f"--model {name} reads {', '.join(fields)}; here a model is needed that reads {field}"
        )
    return model, fields


def generate(settings: Generate) -> Iterator[str]:
    """The text that the model generates, piece by piece."""
    (model, fields), words = loaded(settings.model, "input_ids"), pretrained.tokenizer(settings.model)
    text, template = settings.prompt, words.chat_template is not None and not settings.raw
    if template:
        said = [{"role": "user", "content": text}]
        text = words.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    ids = words(text, add_special_tokens=not template, return_tensors="np")["input_ids"].astype(np.int32)
    reads = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    tokens = tasks.stream(
        model,
        **({"input_ids": None, "encoder": reads} if "decoder_input_ids" in fields else reads),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        eos_id=words.eos_token_id,
        key=jax.random.key(settings.seed) if settings.temperature > 0 else None,
    )
    return tasks.stream_text(words, tokens)


def transcribe(settings: Transcribe) -> str:
    """The transcript; with timestamps a line for each segment."""
    rate, samples = read_any(settings.file)
    samples = samples if rate == RATE else resample(samples, rate)
    (model, _), words = loaded(settings.model, "log_mel"), pretrained.tokenizer(settings.model)
    how: Any = {"language": settings.language, "task": settings.task}
    if len(samples) > 30 * RATE:
        sound = spectrograms.log_mel(samples, model.config.num_mel_bins, seconds=None)
        found = tasks.transcribe_long(model, words, sound, **how)
    else:
        sound = spectrograms.log_mel(samples, model.config.num_mel_bins)
        (found,) = tasks.transcribe(model, words, sound[None], timestamps=settings.timestamps, **how)
    if not settings.timestamps:
        return found.text
    return "\n".join(
        f"{s.start:7.2f} - {'' if s.end is None else format(s.end, '.2f'):>7}  {s.text}"
        for s in found.segments
    )


def classify(settings: Classify) -> str:
    """The most probable classes, a line each: probability and name."""
    from PIL import Image

    model, _ = loaded(settings.model, "image")
    how = image.Preprocess(**pretrained.image_processor(settings.model))
    with Image.open(settings.file) as file:
        pixels = how.resize(np.asarray(file.convert("RGB")))
    if heads.find(model) is None:
        raise InputError(
            f"--model {settings.model} has no classification head: fine-tune it, python -m experiments.finetune"
        )
    forward = jax.jit(lambda model, batch: model(batch)["logits"])
    logits = forward(model, {"image": how.normalise(pixels[None])})[0]
    shares, names = np.asarray(jax.nn.softmax(logits)), class_names(settings.model, len(logits))
    best = np.argsort(-shares)[: settings.top]
    return "\n".join(f"{shares[label]:.3f}  {names[label]}" for label in best)


def class_names(model: str, classes: int) -> Sequence[str]:
    """The names of a model's classes: from its config.json, else ImageNet's if there are 1,000, else numbers."""
    labels = read_config(model, pretrained.resolve(model)).get("id2label") or {}
    names = [labels.get(str(label), "") for label in range(classes)]
    if all(name and not re.fullmatch(r"LABEL_\d+", name) for name in names):
        return names
    known = imagenet_classes()
    return known if classes == len(known) else [f"class {label}" for label in range(classes)]
