"""Bundles by name: pushed to a hub on this machine and pulled from it, by real processes over real connections."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import wait_for
from conftest import speech
from hub_server import Hub, Repository, serving
from w2v_models.bundle import MANIFEST, Bundle, record
from w2v_models.manifest import Source
from w2v_runtime import Embedder

pytest.importorskip("huggingface_hub")

NAME = "me/tiny"
LICENSE = ("--license", "apache-2.0")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as running:
        yield running


class Machine:
    """A user's machine: a home for bundles, and commands that ask one hub."""

    def __init__(self, home: Path, hub: Hub) -> None:
        self.home, self._environment = home, hub.environment() | {"W2V_HOME": str(home), "HF_HOME": str(home / ".hf")}

    def start(self, command: str, *arguments: object, before: str = "", **environment: str) -> subprocess.Popen[str]:
        code = f"{before}\nfrom w2v_runtime.commands.{command} import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | self._environment | environment,
        )  # fmt: skip

    def run(self, command: str, *arguments: object, before: str = "", **environment: str) -> tuple[int, str]:
        """The exit code, and what was said."""
        process = self.start(command, *arguments, before=before, **environment)
        output, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors, errors
        return process.returncode, output + errors

    @property
    def bundle(self) -> Path:
        return self.home / "me--tiny"

    def holds(self) -> list[str]:
        """The bundle's files; hidden ones of its home are not listed."""
        return sorted(str(path.relative_to(self.bundle)) for path in self.bundle.rglob("*") if path.is_file())


@pytest.fixture
def machine(tmp_path, hub) -> Machine:
    return Machine(tmp_path / "home", hub)


def publish(hub: Hub, folder: Path, **extra: bytes) -> Repository:
    """Put a bundle on the hub without our own push."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repository = hub.repositories.setdefault(NAME, Repository())
    repository.commit(files | extra)
    return repository


def changed(folder: Path, bundle: Path, **fields: object) -> Path:
    """A copy of a bundle with another manifest."""
    copy = Bundle.open(Path(shutil.copytree(bundle, folder)))
    Bundle(folder, dataclasses.replace(copy.manifest, **fields)).save()
    return folder


def heavy(folder: Path, bundle: Path) -> Path:
    """A bundle with one large file, of which a client keeps 10 MiB at a time."""
    shutil.copytree(bundle, folder)
    large = folder / "config.json"
    large.write_bytes(np.random.default_rng(0).bytes(32 << 20))
    opened = Bundle.open(folder)
    Bundle(folder, dataclasses.replace(opened.manifest, sources=(record(folder, large),))).save()
    return folder


def test_a_bundle_travels_by_name(bundles, recordings, machine, hub, tmp_path):
    """Pushed here, embedded there by its name alone, with the pusher's numbers; verified, shown and listed there."""
    pushed = Bundle.open(bundles("emotion"))
    code, said = machine.run("models", "push", pushed.folder, NAME, *LICENSE)
    assert code == 0, said
    other = Machine(tmp_path / "other", hub)
    code, said = other.run("embed", recordings, "-m", NAME, "-o", tmp_path / "out.npz")
    assert code == 0, said
    assert f"pulling {NAME} at commit" in said
    mine = Embedder(pushed)
    with np.load(tmp_path / "out.npz") as output:
        for path, values, logits in zip(output["paths"], output["embeddings"], output["logits"], strict=True):
            alone = mine.embed(str(path))
            assert np.abs(values - alone.values).max() <= 2e-5
            assert np.abs(logits - alone.logits).max() <= 2e-5
        assert json.loads(str(output["metadata"]))["bundle"] == pushed.manifest.sha256
    assert not any(path.is_symlink() for path in other.home.rglob("*"))
    assert other.run("models", "verify", NAME)[0] == 0
    code, said = other.run("models", "show", NAME)
    commit = hub.repositories[NAME].branches["main"]
    assert f"{NAME} at commit {commit}" in " ".join(said.split())
    assert "me--tiny" in other.run("models", "list")[1]
    sent = len(hub.sent)
    assert other.run("models", "pull", NAME)[0] == 0
    assert len(hub.sent) == sent  # nothing was missing


def test_the_layout_is_the_hubs(bundles, machine, hub):
    """Where other tools look, with a card whose metadata the hub reads; and only what belongs to the bundle."""
    folder = bundles("large")
    assert machine.run("models", "push", folder, NAME, *LICENSE, "--private")[0] == 0
    files = hub.files(NAME)
    manifest = Bundle.open(folder).manifest
    own = {entry.path for entry in manifest.files} | {MANIFEST, "README.md"}
    assert set(files) == own | {".gitattributes"}
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "config.json", "preprocessor_config.json"} <= own
    assert json.loads(files["config.json"])["model_type"] == "wav2vec2"
    yaml = pytest.importorskip("yaml")
    _, front, text = files["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["license"] == "apache-2.0"
    assert (card["library_name"], card["pipeline_tag"]) == ("w2v-onnx", "feature-extraction")
    assert "onnx" in card["tags"]
    assert "base_model" not in card  # a local folder's name is not a model on the hub
    assert f"w2v-embed recordings/ -m {NAME}" in text
    assert "| fp32 | frames |" in text
    assert hub.repositories[NAME].card_data["private"] == "True"


def test_a_source_on_the_hub_is_the_base_model(bundles, machine, hub, tmp_path):
    """With its licence as the hub has it."""
    source = Source("org/base", "c0ffee" + "0" * 34, "checkpoint", None, None)
    folder = changed(tmp_path / "bundle", bundles("base"), source=source)
    hub.repositories["org/base"] = Repository(card_data={"license": "mit"})
    hub.repositories["org/base"].commit({})
    code, said = machine.run("models", "push", folder, NAME)
    assert code == 0, said
    assert "the licence of org/base is mit" in said
    card = hub.files(NAME)["README.md"].decode()
    for line in ('license: "mit"', 'base_model: "org/base"', "base_model_relation: quantized"):
        assert line in card.splitlines()


def test_the_cards_lines_run(bundles, machine, hub, tmp_path):
    """Both Python examples, as pasted, beside a recording: this package's, and plain onnxruntime's."""
    assert machine.run("models", "push", bundles("base"), NAME, *LICENSE)[0] == 0
    blocks = re.findall(r"```python\n(.*?)```", hub.files(NAME)["README.md"].decode(), re.DOTALL)
    assert len(blocks) == 2
    place = tmp_path / "place"
    place.mkdir()
    soundfile.write(place / "speech.wav", speech(1.0), 16000)
    ours = blocks[0] + "\nassert vector.shape == (48,)\n"
    plain = blocks[1].replace(
        "np.zeros((1, 16000), np.float32)", "soundfile.read('speech.wav', dtype='float32')[0][None]"
    )
    plain = "import soundfile\n" + plain + "\nnp.save('plain.npy', embedding[0])\n"
    environment = os.environ | hub.environment() | {"W2V_HOME": str(tmp_path / "w"), "HF_HOME": str(tmp_path / "hf")}
    for code in (ours, plain):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    expected = Embedder(bundles("base")).embed(str(place / "speech.wav")).values
    assert np.abs(np.load(place / "plain.npy") - expected).max() <= 2e-5


def test_only_the_precisions_asked_for_are_pulled(bundles, machine, hub, tmp_path):
    """fp32 at first; another one later, beside it, without fetching anything twice; a third is refused by name."""
    folder = Path(shutil.copytree(bundles("base"), tmp_path / "bundle"))
    opened = Bundle.open(folder)
    entry = opened.manifest.precisions["fp32"]
    for path in (folder / "onnx").iterdir():
        shutil.copyfile(path, path.with_name(path.name.replace(".onnx", "_fp16.onnx")))

    def half(one):
        return None if one is None else record(folder, folder / one.path.replace(".onnx", "_fp16.onnx"))

    graphs = {name: half(getattr(entry, name)) for name in ("graph", "layers", "features", "encoder", "head", "mel")}
    fp16 = dataclasses.replace(entry, **graphs, data=tuple(map(half, entry.data)))
    precisions = opened.manifest.precisions | {"fp16": fp16}
    Bundle(folder, dataclasses.replace(opened.manifest, precisions=precisions)).save()
    publish(hub, folder)
    assert machine.run("models", "pull", NAME)[0] == 0
    assert not [name for name in machine.holds() if "fp16" in name]
    assert "fp16" in machine.run("models", "show", NAME)[1]
    assert machine.run("models", "pull", NAME, "--precision", "fp16")[0] == 0
    assert set(machine.holds()) == {entry.path for entry in Bundle.open(folder).manifest.files} | {
        MANIFEST,
        "origin.json",
    }
    sent = [name for name in hub.names if name != MANIFEST]
    assert len(sent) == len(set(sent))
    code, said = machine.run("models", "pull", NAME, "--precision", "int8")
    assert code == 2
    assert "holds no int8 graph; choose a precision of: fp32, fp16." in said


def wrong_hash(hub: Hub, folder: Path) -> None:
    hub.faults.wrong.add("onnx/model.onnx_data")


def short_file(hub: Hub, folder: Path) -> None:
    files = hub.files(NAME)
    files["onnx/model.onnx"] = files["onnx/model.onnx"][:-1]


def missing_file(hub: Hub, folder: Path) -> None:
    del hub.files(NAME)["onnx/layers.onnx"]


def gated(hub: Hub, folder: Path) -> None:
    hub.faults.gated.add(NAME)


def unknown(hub: Hub, folder: Path) -> None:
    del hub.repositories[NAME]


def a_checkpoint(hub: Hub, folder: Path) -> None:
    hub.repositories[NAME].commit({"config.json": b"{}", "model.safetensors": b"x"})


def no_manifest(hub: Hub, folder: Path) -> None:
    hub.files(NAME)[MANIFEST] = b"{}"


def failing(hub: Hub, folder: Path) -> None:
    hub.faults.statuses += [500] * 100


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (wrong_hash, "is not the file that its manifest names (SHA-256 differs), so nothing is kept"),
        (short_file, "onnx/model.onnx of me/tiny at commit"),
        (missing_file, "onnx/layers.onnx of me/tiny at commit"),
        (gated, "me/tiny is gated: accept its conditions at http"),
        (unknown, "me/tiny is not on the hub, or private"),
        (a_checkpoint, "it is a checkpoint, not a published bundle. Export it with: w2v-export --model me/tiny"),
        (no_manifest, "is not a bundle that this release reads"),
        (failing, "The hub fails on me/tiny (500); try again later."),
    ],
)
def test_what_the_hub_has_wrong_is_told_and_leaves_nothing(bundles, machine, hub, fault, says):
    """A sentence that names the file or the repository; no bundle, no part of one, no vector."""
    publish(hub, bundles("base"))
    fault(hub, machine.home)
    code, said = machine.run("models", "pull", NAME)
    assert code in (1, 2)
    assert says in said
    assert not machine.bundle.exists()
    assert not list(machine.home.glob(".*/onnx"))


def test_a_revision_that_is_not_there_and_one_that_moves(bundles, machine, hub):
    """The commit is fixed when the pull begins: a branch that moves meanwhile changes nothing of it."""
    repository = publish(hub, bundles("base"))
    first = repository.branches["main"]
    code, said = machine.run("models", "pull", NAME, "--revision", "v9")
    assert code == 2
    assert "me/tiny has no such revision" in said
    hub.faults.meanwhile = lambda: publish(hub, bundles("large"))
    assert machine.run("models", "pull", NAME)[0] == 0
    assert repository.branches["main"] != first
    assert json.loads((machine.bundle / "origin.json").read_text()) == {"repository": NAME, "commit": first}
    assert (machine.bundle / MANIFEST).read_bytes() == (bundles("base") / MANIFEST).read_bytes()
    assert machine.run("models", "pull", NAME)[0] == 0  # and now the new one
    assert (machine.bundle / MANIFEST).read_bytes() == (bundles("large") / MANIFEST).read_bytes()
    assert machine.run("models", "pull", NAME, "--revision", first)[0] == 0
    assert (machine.bundle / MANIFEST).read_bytes() == (bundles("base") / MANIFEST).read_bytes()


def test_too_many_requests_are_asked_again(bundles, machine, hub):
    """After the pause that the hub names."""
    publish(hub, bundles("base"))
    hub.faults.statuses += [429, 429]
    code, said = machine.run("models", "pull", NAME)
    assert code == 0, said
    assert machine.run("models", "verify", NAME)[0] == 0


def partial(machine: Machine) -> int:
    """Bytes of the transfer in progress."""
    return max((path.stat().st_size for path in machine.home.glob(".me--tiny.w2v-partial/*")), default=0)


def test_a_pull_that_was_killed_goes_on_where_it_was(bundles, machine, hub, tmp_path):
    """SIGKILL in the middle of a file; nothing is at the bundle's place; the next pull fetches the rest alone."""
    publish(hub, heavy(tmp_path / "heavy", bundles("base")))
    hub.faults.stalled["config.json"] = 25 << 20
    process = machine.start("models", "pull", NAME)
    wait_for(lambda: partial(machine) >= 20 << 20, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not machine.bundle.exists()
    hub.sent.clear()
    code, said = machine.run("models", "pull", NAME)
    assert code == 0, said
    (first,) = (first for name, first, _ in hub.sent if name == "config.json")
    assert first >= 20 << 20
    assert machine.run("models", "verify", NAME)[0] == 0
    assert not list(machine.home.glob(".me--tiny*"))


def test_a_transfer_that_is_cut_is_told_and_goes_on(bundles, machine, hub, tmp_path):
    """However often the library tries again itself, no byte that is here is fetched twice."""
    publish(hub, heavy(tmp_path / "heavy", bundles("base")))
    hub.faults.cut["config.json"] = (12 << 20, 1)
    code, said = machine.run("models", "pull", NAME)
    if code:
        assert "was cut; the same command goes on where it stopped" in said
        assert not machine.bundle.exists()
        code, said = machine.run("models", "pull", NAME)
    assert code == 0, said
    starts = [first for name, first, _ in hub.sent if name == "config.json"]
    assert starts[0] == 0
    assert all(first >= 10 << 20 for first in starts[1:])
    assert len(starts) == 2


def test_two_pulls_at_once_fetch_once(bundles, machine, hub):
    """The second waits for the first, and finds the bundle there."""
    publish(hub, bundles("base"))
    hub.faults.slow = 0.1
    processes = [machine.start("models", "pull", NAME) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    sent = [name for name in hub.names if name != MANIFEST]
    assert len(sent) == len(set(sent))
    assert machine.run("models", "verify", NAME)[0] == 0


def test_offline_what_is_here_works(bundles, recordings, machine, hub, tmp_path):
    """By option, by variable, and where the hub is down; what is not here is refused at once, and nobody is asked."""
    publish(hub, bundles("base"))
    code, said = machine.run("embed", recordings, "-m", NAME, "-o", tmp_path / "a.npz", "--offline")
    assert code == 2
    assert f"{NAME} has not been exported yet" in said
    code, said = machine.run("embed", recordings, "-m", NAME, "-o", tmp_path / "a.npz", HF_HUB_OFFLINE="1")
    assert code == 2
    assert hub.asked == []
    assert machine.run("models", "pull", NAME)[0] == 0
    hub.asked.clear()
    for i, options in enumerate(({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, {})):
        code, said = machine.run("embed", recordings, "-m", NAME, "-o", tmp_path / f"{i}.npz", **options)
        assert code == 0, said
    assert hub.asked == []
    code, said = machine.run("models", "pull", "me/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2
    assert "me/other is not to be had, since the hub cannot be reached at http://127.0.0.1:9" in said


def test_without_the_extra_it_is_named(bundles, machine, recordings, tmp_path):
    """And what is here works without it."""
    blocked = "import sys; sys.modules['huggingface_hub'] = None"
    code, said = machine.run("embed", recordings, "-m", NAME, "-o", tmp_path / "a.npz", before=blocked)
    assert code == 2
    assert "pip install 'w2v-onnx[hub]'" in said
    code, said = machine.run("models", "pull", NAME, before=blocked)
    assert code == 2
    assert "pip install 'w2v-onnx[hub]'" in said
    model = bundles("base")
    code, said = machine.run("embed", recordings, "-m", model, "-o", tmp_path / "a.npz", before=blocked)
    assert code == 0, said


def test_embedding_does_not_import_the_hubs_package():
    """It takes a second, and is only there for who pulls."""
    code = "import sys; from w2v_runtime import Embedder; import w2v_runtime.commands.embed; "
    code += "import w2v_runtime.bundles.pulling; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_export_is_not_replaced_by_a_pull(bundles, machine, hub):
    """A bundle that was exported to the place of an id is a user's own."""
    publish(hub, bundles("large"))
    shutil.copytree(bundles("base"), machine.bundle)
    before = (machine.bundle / MANIFEST).read_bytes()
    code, said = machine.run("models", "pull", NAME)
    assert code == 2
    assert "holds a bundle that was exported here, so me/tiny is not pulled over it" in said
    assert (machine.bundle / MANIFEST).read_bytes() == before


def damaged(folder: Path) -> None:
    data = folder / "onnx" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x00")


def random_weights(folder: Path) -> None:
    source = Source("org/base", None, "random", 0, "mit")
    Bundle(folder, dataclasses.replace(Bundle.open(folder).manifest, source=source)).save()


def no_derivatives(folder: Path) -> None:
    source = Source("org/base", "c" * 40, "checkpoint", None, "cc-by-nc-nd-4.0")
    Bundle(folder, dataclasses.replace(Bundle.open(folder).manifest, source=source)).save()


@pytest.mark.parametrize(
    ("harm", "options", "says"),
    [
        (damaged, LICENSE, "SHA-256 differs"),
        (random_weights, (), "has random weights, whose embeddings mean nothing; it is not published"),
        (no_derivatives, (), "the licence of org/base, cc-by-nc-nd-4.0, forbids to pass on derivatives"),
        (no_derivatives, LICENSE, "the licence of org/base is cc-by-nc-nd-4.0, not apache-2.0"),
        (lambda folder: None, (), "is unknown, and nothing is published without; if its owner allows it"),
    ],
)
def test_what_may_not_be_published_is_refused_before_anything_is_uploaded(
    bundles, machine, hub, tmp_path, harm, options, says
):
    """Damage, random weights, a licence that forbids it or that nobody knows: the hub has not heard of it."""
    folder = Path(shutil.copytree(bundles("base"), tmp_path / "bundle"))
    harm(folder)
    code, said = machine.run("models", "push", folder, NAME, *options)
    assert code == 2
    assert says in said
    assert not [path for method, path in hub.asked if method != "GET"]
    assert NAME not in hub.repositories


def test_a_push_touches_nothing_of_others(bundles, machine, hub):
    """A repository with something else, one that changes meanwhile, an upload that was lost; then one that works."""
    folder = bundles("base")
    repository = hub.repositories[NAME] = Repository()
    repository.commit({"model.safetensors": b"precious"})
    code, said = machine.run("models", "push", folder, NAME, *LICENSE)
    assert code == 2
    assert "me/tiny holds model.safetensors and no manifest.json" in said
    assert hub.files(NAME) == {"model.safetensors": b"precious"}
    repository.commit({".gitattributes": b""})
    hub.faults.lost.add("onnx/model.onnx")
    code, said = machine.run("models", "push", folder, NAME, *LICENSE)
    assert code == 1
    assert "onnx/model.onnx is not in me/tiny at commit" in said
    hub.faults.lost.clear()
    code, said = machine.run("models", "push", folder, NAME, *LICENSE, "--revision", "next")
    assert code == 0, said
    assert {entry.path for entry in Bundle.open(folder).manifest.files} <= set(hub.files(NAME, "next"))
    assert "onnx/model.onnx" not in hub.files(NAME)
    assert machine.run("models", "pull", NAME, "--revision", "next")[0] == 0


def as_the_hubs_cache(folder: Path, bundle: Path) -> None:
    """Files that are links to blobs beside the snapshot."""
    (folder.parent / "blobs").mkdir()
    for path in bundle.rglob("*"):
        if path.is_file():
            place = folder / path.relative_to(bundle)
            place.parent.mkdir(parents=True, exist_ok=True)
            blob = folder.parent / "blobs" / path.name
            shutil.copyfile(path, blob)
            place.symlink_to(os.path.relpath(blob, place.parent))


def as_a_volume(folder: Path, bundle: Path) -> None:
    """Kubernetes: entries that are links through a link to a dated folder."""
    folder.mkdir()
    shutil.copytree(bundle, folder / "..2026_01_01")
    (folder / "..data").symlink_to("..2026_01_01")
    for path in bundle.iterdir():
        (folder / path.name).symlink_to(f"..data/{path.name}")


def as_a_backup(folder: Path, bundle: Path) -> None:
    """Every file a second name of one elsewhere."""
    shutil.copytree(bundle, folder.with_name("original"))
    shutil.copytree(folder.with_name("original"), folder, copy_function=os.link)


@pytest.mark.parametrize("arrange", [as_the_hubs_cache, as_a_volume, as_a_backup])
def test_a_bundle_behind_links_works_after_the_command_that_is_named(bundles, machine, recordings, tmp_path, arrange):
    """As pasted into a shell, until nothing is refused."""
    folder, output = tmp_path / "linked bundle", tmp_path / "out.npz"
    arrange(folder, bundles("base"))
    model = folder
    for _ in range(20):
        code, said = machine.run("embed", recordings, "-m", model, "-o", output, "--quiet")
        if code == 0:
            break
        assert code == 2
        command = re.search(r"(?:use the copy|file of its own): (c.*)", said)
        assert command, said
        subprocess.run(command[1], shell=True, check=True)
        if "use the copy" in said:
            model = folder.with_name("linked bundle-copy")
    assert code == 0, said
    with np.load(output) as results:
        expected = Embedder(bundles("base")).embed(str(results["paths"][0])).values
        assert np.abs(results["embeddings"][0] - expected).max() <= 2e-5


def test_a_link_to_the_bundle_is_the_bundle(bundles, machine, recordings, tmp_path):
    """The folder itself may be reached through a link."""
    (tmp_path / "link").symlink_to(bundles("base"))
    code, said = machine.run("embed", recordings, "-m", tmp_path / "link", "-o", tmp_path / "out.npz")
    assert code == 0, said
