"""The families of speech encoders that can be exported, by the ``model_type`` of their config.

To add a family, add its entry here, its config fields to ``fields.LAYOUTS``, and its encoder to ``graph``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import transformers
from transformers import PretrainedConfig

from w2v_export.card_models import AgeGenderModel, EmotionModel, FrameModel, XVectorModel, card_class
from w2v_export.fields import LAYOUTS
from w2v_export.graph.adapter import Adapter
from w2v_export.graph.conformer import bert, conformer
from w2v_export.graph.data2vec import data2vec
from w2v_export.graph.encoder import Encoder, transformer
from w2v_export.graph.inference import FrontEnd, Projection
from w2v_export.graph.logmel import LogMelFrontEnd
from w2v_export.graph.waveform import WaveformFrontEnd
from w2v_export.graph.wavlm import wavlm
from w2v_models.manifest import LOG_MEL_FRONT_END, ConvStack

#: Suffixes of the transformers classes whose heads are exported with the encoder, by the kind of head.
HEAD_CLASSES: Final = {
    "ctc": "ForCTC",
    "sequence-classification": "ForSequenceClassification",
    "frame-classification": "ForAudioFrameClassification",
    "x-vector": "ForXVector",
}
#: The models of the kinds of head that transformers does not have, or not in every family.
CARDS: Final = {
    "regression": EmotionModel,
    "age-gender": AgeGenderModel,
    "x-vector": XVectorModel,
    "frame-classification": FrameModel,
}


@dataclass(frozen=True)
class Family:
    """A family of models: its classes in transformers, and how its parts become a graph.

    ``name`` is the prefix of its transformers classes; ``encoder`` builds the graph's encoder from a reference model.
    """

    model_type: str
    name: str
    encoder: Callable[[Any], Encoder]

    @property
    def front_end(self) -> str:
        """The kind of front end, which turns samples into features."""
        return LAYOUTS[self.model_type].front_end

    @property
    def config(self) -> Any:
        """The config class in transformers."""
        return getattr(transformers, f"{self.name}Config")

    @property
    def extractor(self) -> Any:
        """The feature extractor class in transformers."""
        return getattr(transformers, LAYOUTS[self.model_type].extractor["feature_extractor_type"].default)

    @property
    def prefix(self) -> str:
        """The prefix of the encoder's weight names in a checkpoint that was saved with a head."""
        prefix: str = getattr(transformers, f"{self.name}Model").base_model_prefix
        return prefix

    def model(self, head: str | None) -> Any:
        """The reference class with this kind of head, whatever name the checkpoint has for it; None: the encoder alone.

        It is transformers' own class where it has one.
        """
        name = f"{self.name}{HEAD_CLASSES.get(head, '') if head else 'Model'}"
        return getattr(transformers, name) if hasattr(transformers, name) else card_class(self.name, CARDS[head or ""])

    def named_head(self, config: PretrainedConfig) -> str | None:
        """The kind of head by the class that the config's ``architectures`` names; None if that says nothing."""
        kinds = {f"{self.name}{suffix}": kind for kind, suffix in HEAD_CLASSES.items()}
        return kinds.get((config.architectures or [""])[0])

    def parts(self, model: Any, conv: ConvStack, extractor: Any) -> tuple[FrontEnd, Projection, Encoder]:
        """The graph's front end, projection and encoder, from the reference's."""
        reference = model.feature_projection
        projection = Projection(getattr(reference, "layer_norm", None), reference.projection)
        encoder = self.encoder(model)
        if getattr(model, "adapter", None) is not None:
            encoder.adapter = Adapter(model)
        if self.front_end == LOG_MEL_FRONT_END:
            return LogMelFrontEnd(extractor, conv), projection, encoder
        front_end = WaveformFrontEnd(model.feature_extractor, conv, bool(extractor.do_normalize))
        return front_end, projection, encoder


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
        Family("wav2vec2-bert", "Wav2Vec2Bert", bert),
    )
}
