"""The model card of a published bundle: what the hub reads of it, its proof, and the lines that use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from w2v_models.manifest import Manifest
from w2v_models.tolerances import TOLERANCES, worst

CARD: Final = "README.md"


def card(manifest: Manifest, repository: str, licence: str) -> str:
    """The text of the card, for a bundle in ``repository`` whose checkpoint has this licence."""
    source, architecture = manifest.source, manifest.architecture
    first = next(iter(manifest.precisions.values()))
    graph, data = first.graph.path.rpartition("/")[2], first.data[0].path.rpartition("/")[2]
    fetched = f'"{first.graph.path}", "{first.data[0].path}"'
    precision = next(iter(manifest.precisions))
    option = "" if precision == "fp32" else f" --precision {precision}"
    argument = "" if precision == "fp32" else f', precision="{precision}"'
    fields, parity = "\n".join(_fields(manifest, licence)), "\n".join(_parity(manifest))
    return f"""---
{fields}
---

# {source.model} as ONNX

The encoder of `{source.model}` ({architecture.layers} layers of {architecture.hidden_size}), exported with
w2v-onnx. The graph takes raw samples at {architecture.sample_rate} Hz and their lengths; normalisation, masks and
pooling are inside, and what stands in the padding changes nothing.

## Compared with PyTorch

Measured at the export; the worst of all cases.

{parity}

## With w2v-onnx

```sh
pip install 'w2v-onnx[cpu,hub]'
w2v-embed recordings/ -m {repository}{option} -o embeddings.npz
```

```python
from w2v_runtime import Embedder

vector = Embedder("{repository}"{argument}).embed("speech.wav").values  # ({architecture.hidden_size},) float32
```

## With onnxruntime alone

```python
import numpy as np
import onnxruntime
from huggingface_hub import snapshot_download

folder = snapshot_download("{repository}", allow_patterns=[{fetched}], local_dir="bundle")
session = onnxruntime.InferenceSession(f"{{folder}}/{first.graph.path}")
waveform = np.zeros((1, {architecture.sample_rate}), np.float32)  # mono, {architecture.sample_rate} Hz
lengths = np.array([{architecture.sample_rate}])
(embedding,) = session.run(["embedding"], {{"waveform": waveform, "lengths": lengths}})
```

onnxruntime 1.25 or newer; earlier releases open the graph and attend to the padding.

## With onnxruntime-web

```js
import * as ort from "onnxruntime-web";

const fetched = async (name) => new Uint8Array(await (await fetch(
  `https://huggingface.co/{repository}/resolve/main/onnx/${{name}}`)).arrayBuffer());
const session = await ort.InferenceSession.create(await fetched("{graph}"), {{
  executionProviders: ["wasm"],
  externalData: [{{ path: "{data}", data: await fetched("{data}") }}],
}});
const samples = new Float32Array({architecture.sample_rate}); // mono, {architecture.sample_rate} Hz
const {{ embedding }} = await session.run({{
  waveform: new ort.Tensor("float32", samples, [1, samples.length]),
  lengths: new ort.Tensor("int64", BigInt64Array.of(BigInt(samples.length)), [1]),
}});
```

Bundle {manifest.sha256}, exported {manifest.created}.
"""


def _fields(manifest: Manifest, licence: str) -> Iterator[str]:
    """The card's metadata as lines of YAML; a string of JSON is one of YAML."""
    source = manifest.source
    yield f"license: {json.dumps(licence)}"
    yield "library_name: w2v-onnx"
    yield "pipeline_tag: feature-extraction"
    if source.revision is not None:  # it came from the hub, so its name is an id there
        yield f"base_model: {json.dumps(source.model)}"
        yield "base_model_relation: quantized"
    yield f"tags: {json.dumps(['onnx', manifest.architecture.model_type, 'speech', 'audio', 'embeddings'])}"


def _parity(manifest: Manifest) -> Iterator[str]:
    yield "| precision | output | max abs Δ | relative | min cosine |"
    yield "|---|---|---|---|---|"
    for name, entry in manifest.precisions.items():
        for output in TOLERANCES[name]:
            if (row := worst(entry.parity, output)) is not None:
                yield f"| {name} | {output} | {row.max_abs:.1e} | {row.max_rel:.1e} | {row.min_cosine:.7f} |"
