"""Describe a checkpoint by its config, feature extractor and vocabulary, checked before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from w2v_export import fields, foreign, weight_files
from w2v_export.fields import LAYOUTS, Layout
from w2v_export.hub import (
    ADDED_TOKENS,
    CONFIG,
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER,
    VOCABULARY,
    fetch_description,
    fetch_weights,
    list_files,
)
from w2v_export.validation import Kind, checked, choice, contents, problem, read_object, readable, refuse, text, whole
from w2v_models import catalogue, schema
from w2v_models.errors import CheckpointError
from w2v_models.manifest import LOG_MEL_FRONT_END, WAVEFORM_FRONT_END, Architecture

_FLOAT32_BYTES: Final = 4
#: The family whose CTC class in transformers loads adapters of languages.
_ADAPTED: Final = "wav2vec2"
_COPY: Final = "Copy the file of the checkpoint that this one was fine-tuned from"
#: What to do about a feature extractor that is missing: nothing that might not be what the model was trained with.
_ADVICE: Final = {
    WAVEFORM_FRONT_END: (
        f"{_COPY}, or save the extractor that the training used; its do_normalize changes every embedding, and the "
        "weights do not tell it."
    ),
    LOG_MEL_FRONT_END: f"{_COPY}, or save the extractor that the training used.",
}


@dataclass(frozen=True)
class Description:
    """A checkpoint without its weights.

    ``config`` and ``extractor`` hold all fields of ``fields.LAYOUTS`` for the ``model_type``. ``name`` is the hub id or
    the folder's name; ``commit`` is the hub's commit, None for a folder. ``folder`` holds the files; it is None for an
    entry of the catalogue, whose ``labels`` are those of a regression head. ``vocabulary`` has the tokens in the order
    of their ids; None if the checkpoint lists none. Of a checkpoint with a vocabulary for each language, it is that of
    ``language``: the chosen one, whose adapter's weights replace those of the same name (``adapts``), or the default.
    """

    name: str
    commit: str | None
    licence: str | None
    folder: Path | None
    model_type: str
    config: Mapping[str, Any]
    extractor: Mapping[str, Any]
    labels: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] | None = None
    language: str | None = None
    adapts: bool = False

    @property
    def layout(self) -> Layout:
        """The known fields of the model's family."""
        return LAYOUTS[self.model_type]

    @property
    def architecture(self) -> Architecture:
        """The model's architecture as the manifest holds it."""
        return Architecture(
            model_type=self.model_type,
            front_end=self.layout.front_end,
            sample_rate=self.extractor["sampling_rate"],
            conv=self.layout.conv(self.config, self.extractor),
            hidden_size=self.config["hidden_size"],
            layers=self.config["num_hidden_layers"],
            attention_heads=self.config["num_attention_heads"],
            intermediate_size=self.config["intermediate_size"],
            normalise=self.extractor.get("do_normalize", True),
            adapter=fields.adapter(self.config),
        )

    def weight_files(self, offline: bool = False) -> Mapping[Path, frozenset[str] | None]:
        """The weight files as ``weight_files.find`` returns them, fetched first if the checkpoint is on the hub.

        Beside them is the file of the adapter, if one ``adapts`` (``adapter_file``).

        Raises:
            CheckpointError: there are no weights, a file is missing, or the files are too small for the model.
        """
        assert self.folder is not None
        named = self.config[fields.WEIGHTS]
        if self.commit is not None and not offline:
            fetch_weights(self.name, self.folder, named, self.language if self.adapts else None)
        files = weight_files.find(self.folder, named)
        held, least = sum(path.stat().st_size for path in files), fields.least_weights(self.config)
        if held < least:
            raise CheckpointError(
                f"{self.folder / CONFIG} describes a model of at least {least} weights, but {held} bytes of weights "
                f"are there ({', '.join(path.name for path in files)}). {foreign.damaged(next(iter(files)))}"
            )
        return files

    def adapter_file(self) -> Path | None:
        """The file of the chosen language's adapter; None if the weights are used as they are.

        Raises:
            CheckpointError: there is none; the message lists those there are.
        """
        assert self.folder is not None
        return weight_files.find_adapter(self.folder, self.language) if self.adapts and self.language else None


def describe(
    model: str, revision: str | None = None, offline: bool = False, language: str | None = None
) -> Description:
    """Describe the checkpoint in a folder or on the hub, with the adapter of a language if one is given.

    Raises:
        CheckpointError: the checkpoint cannot be found, or a field in one of its files is invalid; the message names
            both. Or it has no such language; the message lists those there are.
    """
    if os.path.isdir(model):
        return _read(Path(model), readable(Path(model).resolve().name), None, _licence(model), language)
    folder = fetch_description(model, revision, offline)
    return _read(folder, model, folder.name, _licence(model), language)


def describe_architecture(model: str) -> Description:
    """Describe an architecture for random weights: that of a checkpoint folder, or of an entry of the catalogue.

    Raises:
        CheckpointError: ``model`` is neither, or as for ``describe``.
    """
    if os.path.isdir(model):
        return _read(Path(model), readable(Path(model).resolve().name), None, None)
    if (variant := catalogue.find(model)) is None:
        known = ", ".join(entry.id for entry in catalogue.CATALOGUE)
        raise CheckpointError(
            f"{model} is neither a folder nor in the catalogue, so its architecture is unknown without its files. "
            f"The catalogue holds: {known}."
        )
    layout = LAYOUTS[variant.model_type]
    config = checked(variant.id, variant.config, layout.config)
    extractor = checked(variant.id, variant.extractor, layout.extractor)
    return Description(
        variant.id, None, variant.licence, None, variant.model_type, config, extractor, labels=variant.labels
    )


def _read(folder: Path, name: str, commit: str | None, licence: str | None, language: str | None = None) -> Description:
    weight_files.refuse_adapter(folder)
    path = folder / CONFIG
    data = read_object(path) if os.path.lexists(path) else {}
    known = choice(*LAYOUTS)
    model_type: Any = data.get("model_type")
    if model_type is None:
        _refuse_foreign(folder, name, commit)
    if not known.fits(model_type):
        raise CheckpointError(f"{path}: {problem('model_type', known, model_type)}.")
    layout = LAYOUTS[model_type]
    refused = {name: why for name, why in fields.REFUSED.items() if data.get(name) and name not in layout.config}
    refuse(path, [f"{name} must be left out: {why}" for name, why in refused.items()])
    config = checked(path, data, layout.config)
    refuse(path, list(fields.config_problems(config)))
    extractor = _read_extractor(folder, layout)
    refuse(path, list(fields.frame_problems(layout, config, extractor)))
    _require_memory(path, fields.least_weights(config))
    if language is not None and (model_type != _ADAPTED or config["adapter_attn_dim"] is None):
        raise CheckpointError(
            f"{path} describes no model with an adapter for each language (adapter_attn_dim of a {_ADAPTED} model), "
            "so there is no --language to choose."
        )
    spoken, vocabulary = _vocabulary(folder, language)
    return Description(
        *(name, commit, licence, folder, model_type, config, extractor),
        vocabulary=vocabulary,
        language=spoken,
        adapts=language is not None,
    )


def _refuse_foreign(folder: Path, name: str, commit: str | None) -> None:
    """Refuse a folder or repository without ``config.json``, or with one that is another toolkit's.

    Raises:
        CheckpointError: it is; the message names the toolkit, or what is there.
    """
    if commit is not None:
        files = list_files(name, commit)
        what, held = name, f"it holds {schema.listed(files)}" if files else "it is empty"
    else:
        try:
            files = set(os.listdir(folder))
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be listed: {error.strerror}.") from None
        what, held = os.fspath(folder), contents(folder)
    if told := foreign.toolkit(what, files):
        raise CheckpointError(told)
    if CONFIG not in files:
        advice = foreign.unfinished(folder) if commit is None else ""
        raise CheckpointError(f"{what} holds no {CONFIG}, so it is not a checkpoint: {held}.{advice}")


def _read_extractor(folder: Path, layout: Layout) -> dict[str, Any]:
    """The feature extractor's fields, from its own file or from the processor's, where new releases keep them.

    Releases of transformers differ in which of the two files they read, so if both exist they must agree.
    """
    found: dict[Path, dict[str, Any]] = {}
    if os.path.lexists(path := folder / PREPROCESSOR):
        data = read_object(path)
        found[path] = checked(path, data.get("feature_extractor", data), layout.extractor)
    if os.path.lexists(path := folder / PROCESSOR) and "feature_extractor" in (data := read_object(path)):
        found[path] = checked(path, data["feature_extractor"], layout.extractor)
    if not found:
        raise CheckpointError(
            f"{folder} does not say how the waveform is prepared: it holds no {PREPROCESSOR}, and no {PROCESSOR} with "
            f"a feature_extractor. {_ADVICE[layout.front_end]}"
        )
    first, *others = found.values()
    differing = [name for name in first if any(other[name] != first[name] for other in others)]
    if differing:
        raise CheckpointError(
            f"{' and '.join(map(str, found))} differ in {', '.join(differing)}, and which of them counts depends on "
            "the release of transformers; remove one."
        )
    return first


def _vocabulary(folder: Path, chosen: str | None) -> tuple[str | None, tuple[str, ...] | None]:
    """The language of the vocabulary, None where there is one for all; and its tokens in the order of their ids.

    There are none without a vocabulary, with gaps in the ids, or where nothing tells the default language.
    """
    tokens: dict[str, int] = {}
    token, index = text(), whole(0, 1 << 20)
    lists = Kind("an object from tokens to numbers", lambda entries: _maps(entries, token, index))
    languages = Kind("an object from languages to such objects", lambda entries: _maps(entries, token, lists))
    language = None
    for name in (VOCABULARY, ADDED_TOKENS):
        path = folder / name
        if not os.path.lexists(path):
            continue
        listed = read_object(path)
        if listed and languages.fits(listed):
            if (language := chosen or _default_language(folder, listed)) is None:
                return None, None
            if language not in listed or "/" in language:
                known = schema.listed(listed, weight_files.MOST_LANGUAGES)
                raise CheckpointError(f"{path} has no language {language!r:.80}; it has {known}.")
            listed = listed[language]
        refuse(path, [] if lists.fits(listed) else [f"it must hold {lists.wanted}, or {languages.wanted}"])
        tokens |= listed
    if chosen != language and chosen is not None:
        raise CheckpointError(f"{folder} has no {VOCABULARY} with languages, so --language cannot be {chosen!r:.80}.")
    ordered = sorted(tokens, key=tokens.__getitem__)
    return language, tuple(ordered) if sorted(tokens.values()) == list(range(len(tokens))) and tokens else None


def _default_language(folder: Path, languages: Mapping[str, Any]) -> str | None:
    """The language that the tokenizer is set to, as the weights are; else the only one; None if nothing tells it."""
    default = None
    if os.path.lexists(path := folder / TOKENIZER):
        default = read_object(path).get("target_lang")
    if default is None and len(languages) == 1:
        default = next(iter(languages))
    return default if isinstance(default, str) and default in languages else None


def _maps(entries: Any, names: Kind, values: Kind) -> bool:
    return type(entries) is dict and all(map(names.fits, entries)) and all(map(values.fits, entries.values()))


def _require_memory(path: Path, weights: int) -> None:
    """Refuse a model whose float32 weights exceed the machine's memory."""
    needed, there = weights * _FLOAT32_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise CheckpointError(
            f"{path} describes a model of at least {weights} weights, which take {needed / 1e9:.0f} GB, but this "
            f"machine has {there / 1e9:.0f} GB of memory."
        )


def _licence(model: str) -> str | None:
    variant = catalogue.find(model)
    return None if variant is None else variant.licence
