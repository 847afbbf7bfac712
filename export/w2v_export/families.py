"""The families of speech encoders that can be exported, by the ``model_type`` of their config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import transformers
from transformers import PretrainedConfig

from w2v_export.graph.conformer import bert, conformer
from w2v_export.graph.data2vec import data2vec
from w2v_export.graph.encoder import Encoder, transformer
from w2v_export.graph.inference import FrontEnd, Projection
from w2v_export.graph.logmel import LogMelFrontEnd
from w2v_export.graph.waveform import WaveformFrontEnd
from w2v_export.graph.wavlm import wavlm
from w2v_models.manifest import LOG_MEL_FRONT_END, WAVEFORM_FRONT_END, ConvStack

#: The suffixes of transformers' classes whose heads are exported with the encoder.
HEAD_CLASSES: Final = ("ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector")


@dataclass(frozen=True)
class Family:
    """One family: its classes in transformers, and how its parts become a graph.

    ``name`` is the prefix of its classes in transformers, and ``encoder`` builds the graph's encoder from its model.
    """

    model_type: str
    name: str
    encoder: Callable[[Any], Encoder]
    front_end: str = WAVEFORM_FRONT_END

    @property
    def config(self) -> Any:
        """The class of its configs."""
        return getattr(transformers, f"{self.name}Config")

    @property
    def extractor(self) -> Any:
        """The class of its feature extractors."""
        waveform = self.front_end == WAVEFORM_FRONT_END
        return transformers.Wav2Vec2FeatureExtractor if waveform else transformers.SeamlessM4TFeatureExtractor

    def model(self, config: PretrainedConfig) -> Any:
        """The class of a checkpoint: that with its head where the head is one of transformers', else the encoder's."""
        architecture = (config.architectures or [""])[0]
        suffix = architecture.removeprefix(self.name)
        return getattr(transformers, architecture if suffix in HEAD_CLASSES else f"{self.name}Model")

    def conv(self, config: PretrainedConfig, extractor: Any) -> ConvStack:
        """The strided levels between samples and frames."""
        if self.front_end == LOG_MEL_FRONT_END:
            bands, stacked = extractor.num_mel_bins, extractor.stride
            return ConvStack((MEL_WINDOW, stacked), (MEL_HOP, stacked), (bands, bands * stacked))
        return ConvStack(tuple(config.conv_kernel), tuple(config.conv_stride), tuple(config.conv_dim))

    def parts(self, model: Any, conv: ConvStack, extractor: Any) -> tuple[FrontEnd, Projection, Encoder]:
        """The graph's front end, projection and encoder, from the reference's."""
        reference = model.feature_projection
        projection = Projection(getattr(reference, "layer_norm", None), reference.projection)
        if self.front_end == LOG_MEL_FRONT_END:
            return LogMelFrontEnd(extractor, conv), projection, self.encoder(model)
        front_end = WaveformFrontEnd(model.feature_extractor, conv, bool(extractor.do_normalize))
        return front_end, projection, self.encoder(model)


#: Window and hop of the log-mel front end in samples, which ``SeamlessM4TFeatureExtractor`` does not let one choose.
MEL_WINDOW: Final = 400
MEL_HOP: Final = 160

FAMILIES: Final = {
    family.model_type: family
    for family in (
        Family("wav2vec2", "Wav2Vec2", transformer),
        Family("hubert", "Hubert", transformer),
        Family("unispeech", "UniSpeech", transformer),
        Family("unispeech-sat", "UniSpeechSat", transformer),
        Family("wavlm", "WavLM", wavlm),
        Family("data2vec-audio", "Data2VecAudio", data2vec),
        Family("wav2vec2-conformer", "Wav2Vec2Conformer", conformer),
        Family("wav2vec2-bert", "Wav2Vec2Bert", bert, LOG_MEL_FRONT_END),
    )
}
