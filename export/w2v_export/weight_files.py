"""Find the files of a checkpoint's weights: exactly those that transformers loads from its folder.

transformers (``_get_resolved_checkpoint_files`` in its ``modeling_utils``, the same from 4.53 to 5) takes the file that
the config names, else the first of ``ORDER`` that exists; if that is an index, all files (shards) that it names. No
other file of the folder is read. Only this module decides which files those are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from w2v_export import foreign
from w2v_export.validation import Field, Kind, checked, contents, plain_path, read_object
from w2v_models import schema
from w2v_models.errors import CheckpointError

SAFETENSORS: Final = "model.safetensors"
PICKLE: Final = "pytorch_model.bin"
INDEX_SUFFIX: Final = ".index.json"
ORDER: Final = (SAFETENSORS, SAFETENSORS + INDEX_SUFFIX, PICKLE, PICKLE + INDEX_SUFFIX)
#: The config of a PEFT adapter, whose weights change those of a base model.
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTERS: Final = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")

#: The most languages that a message lists; MMS has 1162.
MOST_LANGUAGES: Final = 2000

#: The first bytes of a Git LFS pointer, which a clone without Git LFS has in place of a large file.
_LFS_POINTER: Final = b"version https://git-lfs"
_OBJECT: Final = Kind("an object", lambda value: type(value) is dict)


def entry(has: Callable[[str], bool], named: str | None) -> str | None:
    """The file or index to load: the one ``named`` in the config, else the first of ``ORDER`` that exists, or None."""
    return named or next((name for name in ORDER if has(name)), None)


def read_index(path: Path) -> dict[str, str]:
    """The file of each weight, by the weight's name, from an index of weights.

    Raises:
        CheckpointError: the file is no index, or names files of another format or outside its folder.
    """
    suffix = Path(path.name.removesuffix(INDEX_SUFFIX)).suffix
    shard = plain_path(suffix)
    files = Kind(
        f"an object from the names of weights to {shard.wanted}",
        lambda value: type(value) is dict and len(value) > 0 and all(map(shard.fits, value.values())),
    )
    index = {"metadata": Field(_OBJECT, None), "weight_map": Field(files, None)}
    data = read_object(path)
    if missing := [name for name in index if name not in data]:
        raise CheckpointError(f"{path} is no index of weights: it lacks {', '.join(missing)}.")
    weight_map: dict[str, str] = checked(path, data, index)["weight_map"]
    return weight_map


def find(folder: Path, named: str | None) -> Mapping[Path, frozenset[str] | None]:
    """The files with a folder's weights, each with the weight names that the index lists for it, None without index.

    Raises:
        CheckpointError: there are no weights, or a file is missing or cannot be read.
    """
    first = entry(lambda name: os.path.isfile(folder / name), named)
    if first is None:
        raise CheckpointError(
            f"{folder} holds no weights ({', '.join(ORDER[:2])} or {', '.join(ORDER[2:])}): {contents(folder)}."
            f"{foreign.unfinished(folder)}"
        )
    if not first.endswith(INDEX_SUFFIX):
        _require_readable(folder, [first], f"its config names {first} as its weights")
        return {folder / first: None}
    weight_map = read_index(folder / first)
    names = sorted(set(weight_map.values()))
    _require_readable(folder, names, f"{first} names it")
    return {folder / name: frozenset(weight for weight, file in weight_map.items() if file == name) for name in names}


def adapter_names(language: str) -> tuple[str, str]:
    """The names that transformers gives the weights of a language's adapter, the one that it looks for first before."""
    return f"adapter.{language}.safetensors", f"adapter.{language}.bin"


def find_adapter(folder: Path, language: str) -> Path:
    """The file with the weights of a language: those of its adapter in each block, and of its head.

    Raises:
        CheckpointError: there is none; the message lists the languages of those there are.
    """
    for name in adapter_names(language):
        if os.path.isfile(folder / name):
            _require_readable(folder, [name], f"{language} needs it")
            return folder / name
    there = {path.name.split(".")[1] for path in folder.glob("adapter.*.*") if path.suffix in (".safetensors", ".bin")}
    raise CheckpointError(
        f"{folder} holds no {adapter_names(language)[0]} with the weights of {language}; "
        f"the adapters there: {schema.listed(there, MOST_LANGUAGES) or 'none'}."
    )


def _require_readable(folder: Path, names: list[str], why: str) -> None:
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise CheckpointError(f"{folder} does not hold the file {', '.join(missing)}, though {why}.")
    for path in (folder / name for name in names):
        try:
            with open(path, "rb") as file:
                begin = file.read(len(_LFS_POINTER))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
        if begin == _LFS_POINTER:
            raise CheckpointError(f"{path} is a pointer of Git LFS, not the weights; fetch them: git lfs pull")


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with a PEFT adapter, which transformers without PEFT would silently ignore.

    Raises:
        CheckpointError: the folder holds an adapter; the message shows how to merge it.
    """
    if found := [name for name in ADAPTERS if os.path.lexists(folder / name)]:
        raise CheckpointError(
            f"{folder} holds an adapter ({', '.join(found)}), which changes the weights of a model and is not part of "
            "them. Merge it, and export what that saves: "
            f"PeftModel.from_pretrained(base_model, {str(folder)!r}).merge_and_unload().save_pretrained(new_folder)"
        )
