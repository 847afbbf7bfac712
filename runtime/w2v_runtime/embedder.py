"""The public Python interface: :class:`Embedder` turns recordings into embeddings with one opened bundle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from w2v_models.manifest import LAST_LAYER
from w2v_runtime.audio.reading import Audio
from w2v_runtime.audio.recordings import Recording, check_recording, check_recordings, name_of
from w2v_runtime.embedding.corpus import CorpusOptions, embed_in_order
from w2v_runtime.embedding.inputs import AHEAD_IN_ORDER, Context, Input, grouped, label_of, segment_of
from w2v_runtime.embedding.model import Model
from w2v_runtime.embedding.results import Embedding, Failure, Request


class Embedder(Model):
    """An opened bundle that embeds audio.

    Threads may share it, and a forked process may go on using it. A pickle or a copy holds only the arguments: it opens
    the bundle again at its first use, and equal copies in one process share one engine.

    Args:
        model: a bundle folder, the id of an exported model, or None for the only exported one. The id of a published
            bundle that is not here is pulled from the hub, with the extra ``hub`` and unless ``HF_HUB_OFFLINE=1``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, several as ``cuda:0,cuda:1``, or ``openvino``.
        precision: one that the bundle holds and the device computes: ``fp32``, ``tf32``, ``fp16``, ``bf16``, ``int8``.
        threads: threads inside the engine; None follows the processors that this process may use.
        windowing: up to which length audio is embedded whole, and the windows and their context into which longer audio
            is split.
        request: the request whose graph is opened at once. Any other request opens a graph of its own when it is made;
            the most recent of those stay open.
        prepack: whether ONNX Runtime rearranges the weights for ``request``, which takes as much memory again. If
            False, as for all other requests, the base model opens in a tenth of the time, runs take a little longer,
            and results differ in their last bits.
        scratch: the folder for frames of a long recording that would fill the memory; None means the system's folder
            for temporary files.

    Raises:
        RefusedError: the request names a layer that the model does not have.
        BundleError: the bundle is missing, damaged or lacks the precision.
        EngineError: the engine or device is not available.
        W2VError: the transfer from the hub was cut.

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
        """Embed one recording; :class:`~w2v_runtime.embedding.results.Embedding` gives the shapes of the result.

        Args:
            audio: a path, the bytes of a file, an open binary file, or (waveform, sample_rate) with shape (samples,) or
                (samples, channels).
            level: ``utterance`` or ``frame``.
            pooling: ``mean``, ``std``, ``min``, ``max``, or several of them.
            layer: ``last``, ``all``, a number from 0, or several of them.
            channel: a channel number from 0; None for the mean of all.
            pad_short: whether audio that is too short for one frame, or for the head, is padded with silence.
            layer_weights: one weight for each layer from 0; the result is the weighted sum of all layers. Weights that
                do not add up to 1, or are negative, are a probe's parameters before its softmax, which is applied.

        Raises:
            TypeError: ``audio`` is none of these.
            AudioError: ``audio`` cannot be read, or is too short for one frame or for the head.
            RefusedError: the level, pooling or layer is unknown, or the model does not have the layer.

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
        path, read = name_of(recording), self.read(recording, options.channel, options.pad_short)
        if isinstance(read, Audio):
            return self.embed_batch([path], [read], request)[0]
        (result,) = self.embed_long([(path, read)], request)
        if isinstance(result, Embedding):
            return result
        raise result

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

        Recordings are of the kinds that :meth:`embed` takes; they are read ahead and batched. An open file must stay
        open until its result is yielded. Leaving the loop early stops the work of this call only.

        Args:
            paths: an iterable of recordings, which may be endless: it is read a little ahead of the results. An
                exception that it raises is raised again after the results of the recordings before it.
            level: as for :meth:`embed`.
            pooling: as for :meth:`embed`.
            layer: as for :meth:`embed`.
            layer_weights: as for :meth:`embed`.
            options: the fields of :class:`~w2v_runtime.embedding.corpus.CorpusOptions`.

        Raises:
            TypeError: ``paths`` is a single recording, an item is not a recording, or an option is unknown.
            RefusedError: the level, pooling, layer or an option's value is unknown or out of bounds.

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

    def embed_segments(
        self,
        files: Iterable[Recording],
        starts: Iterable[float],
        ends: Iterable[float | None],
        level: str = "utterance",
        pooling: str | Sequence[str] = "mean",
        layer: str | int | Sequence[str | int] = LAST_LAYER,
        layer_weights: Sequence[float] | None = None,
        context: Context = 0.0,
        **options: Any,
    ) -> Iterator[Embedding | Failure]:
        """Embed segments of recordings: one :class:`Embedding` or :class:`Failure` each, in their order.

        Segments of one recording are decoded once, whatever their order, if they are less than 16 384 segments apart.

        Args:
            files: the recording of each segment, of the kinds that :meth:`embed` takes; name it again for each.
            starts: where each begins, in seconds from the start of its recording.
            ends: where each ends, in seconds; None or NaN is the end of the recording.
            level: as for :meth:`embed`; frames have the times of the recording, from ``embedding.segment.first`` on.
            pooling: as for :meth:`embed`.
            layer: as for :meth:`embed`.
            layer_weights: as for :meth:`embed`.
            context: what the model hears around a segment: 0 nothing, so that it equals the embedding of the cut
                segment; seconds on each side; or ``whole``, the recording. The frames whose centre lies inside the
                segment are then its frames.
            options: the fields of :class:`~w2v_runtime.embedding.corpus.CorpusOptions`.

        Raises:
            TypeError: a file is not a recording, a time is not a number, or an option is unknown.
            ValueError: there are not as many starts or ends as files.
            RefusedError: the level, pooling, layer, context or an option's value is unknown or out of bounds.

        Examples:
            >>> embedder = Embedder("facebook/wav2vec2-base-960h", device="cpu")
            >>> files, starts, ends = ["speech.wav", "speech.wav"], [0.0, 1.2], [0.9, 2.0]
            >>> [result.values.shape for result in embedder.embed_segments(files, starts, ends, context="whole")]
            [(768,), (768,)]
        """
        chosen = CorpusOptions.of(options, context, "embed_segments")
        request = self.resolve(Request.of(level, pooling, layer, layer_weights, spans=bool(context)))
        rows = zip(check_recordings(files, "embed_segments"), starts, ends, strict=True)
        inputs = (
            Input(position, name_of(file), file, segment, label_of(f"segment {position}", segment))
            for position, (file, segment) in enumerate((file, segment_of(start, end)) for file, start, end in rows)
        )
        return embed_in_order(self, grouped(inputs, AHEAD_IN_ORDER), request, chosen)
