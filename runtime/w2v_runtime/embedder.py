"""The public face: recordings in, embeddings out, through one opened bundle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from w2v_models.manifest import LAST_LAYER
from w2v_runtime.audio.recordings import Recording, check_recording, check_recordings, name_of
from w2v_runtime.embedding.corpus import CorpusOptions, Input, embed_in_order
from w2v_runtime.embedding.model import Model
from w2v_runtime.embedding.results import Embedding, Failure, Request


class Embedder(Model):
    """An opened bundle that embeds audio.

    Threads may share it, and a forked process may go on using it. It pickles and copies as what it was opened with:
    the copy opens the bundle again when it is first used, and copies in one process share what they opened.

    Args:
        model: a bundle folder, the id of an exported model, or None for the only exported one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, several as ``cuda:0,cuda:1``, or ``openvino``.
        precision: one that the bundle holds and the device computes: ``fp32``, ``tf32``, ``fp16``, ``bf16``, ``int8``.
        threads: threads inside the engine; None follows the processors that this process may use.
        windowing: how long audio is cut.
        request: what it is opened for; anything else can be asked of it too, and opens a graph of its own, of which
            the most recent stay open.
        prepack: whether ONNX Runtime rearranges the weights for ``request``, which takes as much memory again. Without,
            as for all other requests, the base model opens in a tenth of the time, runs take a little longer, and
            results differ in their last bits.
        scratch: the folder for frames of a long recording that would fill the memory; None is the system's for
            temporary files.

    Raises:
        RefusedError: the request names a layer that the model does not have.
        BundleError: the bundle is missing, damaged or lacks the precision.
        EngineError: the engine or device cannot be had.

    Examples:
        >>> from w2v_runtime import Embedder
        >>> embedder = Embedder("facebook/wav2vec2-base-960h", device="cpu")
        >>> embedder.sample_rate, embedder.labels
        (16000, ())
        >>> embedder.embed("speech.wav").values.shape
        (768,)
    """

    def embed(
        self,
        audio: Recording,
        level: str = "utterance",
        pooling: str | Sequence[str] = "mean",
        layer: str | int | Sequence[str | int] = LAST_LAYER,
        channel: int | None = None,
        pad_short: bool = False,
        layer_weights: Sequence[float] | None = None,
    ) -> Embedding:
        """Embed one recording.

        Args:
            audio: a path, the bytes of a file, an open binary file, or (waveform, sample_rate) with shape (samples,) or
                (samples, channels).
            level: ``utterance`` or ``frame``.
            pooling: ``mean``, ``std``, ``min``, ``max``, or several of them.
            layer: ``last``, ``all``, a number from 0, or several of them.
            channel: a channel number from 0; None for the mean of all.
            pad_short: whether silence is added to what is too short.
            layer_weights: of the layers from 0, to make one vector of all of them.

        Raises:
            TypeError: ``audio`` is none of these.
            AudioError: it cannot be read, or is too short for one frame.
            RefusedError: the level, pooling or layer is not to be had.

        Examples:
            >>> embedder = Embedder("facebook/wav2vec2-base-960h", device="cpu")
            >>> frames = embedder.embed("speech.wav", level="frame")
            >>> frames.values.shape, frames.duration  # a frame every 20 ms
            ((99, 768), 2.0)
            >>> embedder.times.starts(len(frames.values))[:3].tolist()
            [0.0, 0.02, 0.04]
            >>> import numpy as np
            >>> tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000, dtype=np.float32)
            >>> embedder.embed((tone, 8000), pooling="mean,std", layer=[0, 1]).values.shape
            (2, 1536)
        """
        request = self.resolve(Request.of(level, pooling, layer, layer_weights))
        options, recording = CorpusOptions(channel, pad_short), check_recording(audio)
        held = self.read(recording, options.channel, options.pad_short)
        if held is None or self.is_long(held):
            return self.embed_long(recording, held, options.channel, request)
        return self.embed_batch([name_of(recording)], [held], request)[0]

    def embed_files(
        self,
        paths: Iterable[Recording],
        level: str = "utterance",
        pooling: str | Sequence[str] = "mean",
        layer: str | int | Sequence[str | int] = LAST_LAYER,
        layer_weights: Sequence[float] | None = None,
        **options: Any,
    ) -> Iterator[Embedding | Failure]:
        """Embed many recordings: one :class:`Embedding` or :class:`Failure` each, in their order.

        They are of the kinds that :meth:`embed` takes, read ahead and batched. Open files must stay open until their
        result is there. Whoever leaves the loop early ends this work alone.

        Args:
            paths: an iterable, which may be endless: it is read a little ahead of the results. What it raises is
                raised behind the results of what came before.
            level: as for :meth:`embed`, like the next three.
            pooling: what becomes of the frames.
            layer: which layers.
            layer_weights: instead of ``layer``.
            options: those of :class:`~w2v_runtime.embedding.corpus.CorpusOptions`.

        Raises:
            TypeError: a single recording, something that is none, or an unknown option.
            RefusedError: the level, pooling, layer or an option's value is not to be had.

        Examples:
            >>> embedder = Embedder("facebook/wav2vec2-base-960h", device="cpu")
            >>> for result in embedder.embed_files(["speech.wav", "missing.wav"]):
            ...     print(type(result).__name__, result.path)
            Embedding speech.wav
            Failure missing.wav
        """
        request = self.resolve(Request.of(level, pooling, layer, layer_weights))
        chosen, given = CorpusOptions.of(options), check_recordings(paths)
        inputs = (Input(position, name_of(recording), recording) for position, recording in enumerate(given))
        return embed_in_order(self, inputs, request, chosen)
