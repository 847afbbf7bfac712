"""The inference form of a wav2vec 2.0 encoder: raw samples and lengths in, named outputs out.

The reference (transformers) runs channels-first convolutions, normalises the waveform outside the model, and lets
padding leak into the group norm. This form computes the same numbers from a padded batch:

- the waveform is normalised over each utterance's valid samples;
- activations stay channels-last, so layer norms need no transposes and every strided convolution is one GEMM:
  with stride 2, two neighbouring frames (batch, time, channels) *are* one row of (batch, time/2, 2·channels);
- the waveform is padded so that every level's length is even; surplus frames ride along and the lengths mask them;
- the group norm after conv 0 is folded into conv 0's weights, one set for each utterance (:class:`GroupNormFrontEnd`);
- attention is the ONNX operator ``Attention``, which takes the number of valid frames and needs no mask.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.onnx.symbolic_helper import parse_args
from torch.onnx.utils import register_custom_op_symbolic

from w2v_models.manifest import EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE, LOGITS, ConvStack

#: Added to the variance in the waveform's normalisation (``Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm``).
NORMALISATION_EPSILON: Final = 1e-7
#: "To the end" in an ONNX ``Slice``.
INT64_MAX: Final = 2**63 - 1


def valid(lengths: Tensor, size: Any) -> Tensor:
    """Mask of the first ``lengths`` of ``size`` positions: (batch,) → (batch, size, 1) bool."""
    return (torch.arange(size, device=lengths.device)[None, :] < lengths[:, None])[:, :, None]


def count(lengths: Tensor) -> Tensor:
    """Lengths as a divisor: (batch,) → (batch, 1, 1) float, at least 1, so that an empty row stays finite."""
    return lengths.clamp(min=1).to(torch.float32)[:, None, None]


def masked_mean(frames: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the valid frames: (batch, time, channels) → (batch, 1, channels).

    Summed in float64: engines add hundreds of thousands of float32 samples one after the other, and a layer norm
    over a pause makes the lost digits of an offset visible.
    """
    total = torch.where(mask, frames, 0.0).double().sum(1, keepdim=True)
    return (total / count(lengths).double()).to(frames.dtype)


def _constant(g: Any, *values: int) -> Any:
    return g.op("Constant", value_t=torch.tensor(values))


def _absent(g: Any) -> Any:
    none = g.op("prim::Constant")
    none.setType(torch._C.OptionalType.ofTensor())
    return none


def _shaped(value: Any, channels: int) -> Any:
    """Tell the exporter that ``value`` is (batch, time, channels): it cannot infer that from our own nodes."""
    value.setType(torch._C.TensorType.get().with_dtype(torch.float32).with_sizes([None, None, channels]))
    return value


@torch.library.custom_op("w2v::blocks", mutates_args=())
def blocks(x: Tensor, kernel: int, stride: int, channels: int) -> Tensor:
    """Frames of a kernel over blocks: (batch, stride·n, C) → (batch, n - b + 1, kernel·C), b = ⌈kernel/stride⌉.

    The input *is* (batch, n, stride·C); b shifted views of it side by side, cut to kernel·C columns, hold every
    frame. An operator of its own because traced PyTorch would spend two slices on a view where ONNX needs one.
    """
    rows = x.reshape(x.shape[0], -1, stride * channels)
    extra = math.ceil(kernel / stride) - 1
    views = [rows[:, shift : rows.shape[1] - extra + shift] for shift in range(extra + 1)]
    return torch.cat(views, dim=-1)[:, :, : kernel * channels].clone()


@parse_args("v", "i", "i", "i")
def _blocks_onnx(g: Any, x: Any, kernel: int, stride: int, channels: int) -> Any:
    rows = g.op("Reshape", x, _constant(g, 0, -1, stride * channels))
    extra = math.ceil(kernel / stride) - 1
    views = [
        g.op("Slice", rows, _constant(g, shift), _constant(g, shift - extra), _constant(g, 1)) for shift in range(extra)
    ]
    rest = (kernel - extra * stride) * channels
    views.append(g.op("Slice", rows, _constant(g, extra, 0), _constant(g, INT64_MAX, rest), _constant(g, 1, 2)))
    frames = g.op("Concat", *views, axis_i=2) if extra else rows if kernel == stride else views[0]
    return _shaped(frames, kernel * channels)


@torch.library.custom_op("w2v::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, heads: int, head_size: int) -> Tensor:
    """Multi-head attention over the first ``lengths`` keys: (batch, time, C) each, (batch,) → (batch, time, C).

    In ONNX this is ``Attention`` of operator set 24 with ``nonpad_kv_seqlen``. The exporter knows sets up to 20, so
    the model's set is raised after the export (``w2v_export.onnx``).
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, head_size).transpose(1, 2) for x in (query, key, value))
    mask = valid(lengths, key.shape[1]).transpose(1, 2)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@parse_args("v", "v", "v", "v", "i", "i")
def _attention_onnx(g: Any, query: Any, key: Any, value: Any, lengths: Any, heads: int, head_size: int) -> Any:
    absent = [_absent(g) for _ in ("attn_mask", "past_key", "past_value")]
    attended = g.op("Attention", query, key, value, *absent, lengths, q_num_heads_i=heads, kv_num_heads_i=heads)
    return _shaped(attended, heads * head_size)


def register_symbolics(opset: int) -> None:
    """Teach the TorchScript exporter the two operators above, from operator set ``opset`` on."""
    register_custom_op_symbolic("w2v::blocks", _blocks_onnx, opset)
    register_custom_op_symbolic("w2v::attention", _attention_onnx, opset)


class Dense(nn.Module):
    """A linear layer with its weight stored (in, out), as a matrix product from the left takes it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(cls, linear: nn.Linear) -> Dense:
        return cls(linear.weight.T, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Normalise(nn.Module):
    """Zero mean and unit variance over the valid samples; zero in the padding (Wav2Vec2FeatureExtractor)."""

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        mask = valid(lengths, waveform.shape[1])
        waveform = waveform[:, :, None]
        mean = masked_mean(waveform, mask, lengths)
        centred = torch.where(mask, waveform - mean, 0.0)
        variance = masked_mean(centred.square(), mask, lengths)
        return (centred / torch.sqrt(variance + NORMALISATION_EPSILON)).squeeze(2)


class BlockConv(nn.Module):
    """A strided 1-d convolution as one GEMM over blocks, channels-last.

    Shape: (batch, stride·n, C_in) → (batch, n - ⌈kernel/stride⌉ + 1, C_out).
    """

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.kernel, self.stride, self.channels = conv.kernel_size[0], conv.stride[0], conv.in_channels
        self.dense = Dense(conv.weight.permute(2, 1, 0).flatten(0, 1), conv.bias)

    def frames(self, x: Tensor) -> Tensor:
        """The inputs under each position of the kernel: (batch, frames, kernel·C_in)."""
        return blocks(x, self.kernel, self.stride, self.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.frames(x))


class GroupNormFrontEnd(nn.Module):
    """Conv 0 and its group norm, with statistics over each utterance's valid frames only, as one batched GEMM.

    Conv 0 is linear in its frame f of k samples. With m and C the mean and k×k covariance of f over the valid frames,
    output channel c, w_c·f + b_c, has mean w_c·m + b_c and variance w_cᵀ C w_c. The norm is therefore conv 0 itself
    with weights w_c·γ_c/√(w_cᵀ C w_c + ε) and bias β_c - (w_c·m)·γ_c/√(…): the conv's own bias cancels, and no pass
    over the (frames, channels) activation is needed.

    The reference's statistics include the remainder of samples that reaches no frame of the last level. The input is
    therefore longer by one such frame, ``surplus`` frames of this level, which count here and go no further.
    """

    def __init__(self, conv: nn.Conv1d, norm: nn.GroupNorm, surplus: int) -> None:
        super().__init__()
        if norm.num_groups != norm.num_channels:
            raise ValueError("the group norm must have one channel in a group")
        self.conv = BlockConv(conv)
        self.scale = nn.Parameter(norm.weight.detach().clone())
        self.shift = nn.Parameter(norm.bias.detach().clone())
        self.epsilon = norm.eps
        self.surplus = surplus

    def statistics(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (batch, 1, k) and covariance (batch, k, k) of the frames that lie within ``lengths`` samples."""
        valid_frames = (lengths + self.conv.stride - self.conv.kernel).clamp(min=0)
        valid_frames = valid_frames.div(self.conv.stride, rounding_mode="trunc")
        mask = valid(valid_frames, frames.shape[1])
        mean = masked_mean(frames, mask, valid_frames)
        centred = torch.where(mask, frames - mean, 0.0)
        return mean, centred.transpose(1, 2) @ centred / count(valid_frames)

    def forward(self, x: Tensor, lengths: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        frames = self.conv.frames(x)
        mean, covariance = statistics or self.statistics(frames, lengths)
        weight = self.conv.dense.weight
        variance = (weight * (covariance @ weight)).sum(1, keepdim=True)
        scale = self.scale / torch.sqrt(variance + self.epsilon)
        return frames[:, : -self.surplus] @ (weight * scale) + (self.shift - (mean @ weight) * scale)


class ConvLayer(nn.Module):
    """One level of the feature encoder: convolution, layer norm where the model has one, activation."""

    def __init__(self, layer: Any, surplus: int) -> None:
        super().__init__()
        norm: Any = getattr(layer, "layer_norm", None)
        self.grouped = isinstance(norm, nn.GroupNorm)
        self.conv = GroupNormFrontEnd(layer.conv, norm, surplus) if self.grouped else BlockConv(layer.conv)
        self.norm = None if self.grouped else norm
        self.activation = layer.activation

    def forward(self, x: Tensor, lengths: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
        x = self.conv(x, lengths, statistics) if self.grouped else self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.activation(x)


class PositionalConv(nn.Module):
    """The grouped convolution that stands in for position embeddings, its weight norm folded."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        reference = embedding.conv
        (kernel,) = reference.kernel_size
        self.conv = nn.Conv1d(reference.in_channels, reference.out_channels, kernel, groups=reference.groups, padding=0)
        self.conv.weight = nn.Parameter(reference.weight.detach().clone())
        self.conv.bias = nn.Parameter(reference.bias.detach().clone())
        self.padding = (kernel // 2, (kernel - 1) // 2)
        self.activation = embedding.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(F.pad(x.transpose(1, 2), self.padding))).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the valid frames, with two of its four biases folded away.

    A key bias adds q·b_k to every score of a row, and softmax ignores what a row shares; attention weights sum to 1,
    so a value bias adds b_v to every output, which the output projection turns into a constant.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads: int = attention.num_heads
        self.head_size: int = attention.head_dim
        self.query = Dense.of(attention.q_proj)
        self.key = Dense(attention.k_proj.weight.T, None)
        self.value = Dense(attention.v_proj.weight.T, None)
        output = attention.out_proj
        self.output = Dense(output.weight.T, output.bias + output.weight @ attention.v_proj.bias)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        attended = attention(self.query(x), self.key(x), self.value(x), lengths, self.heads, self.head_size)
        return self.output(attended)


class EncoderLayer(nn.Module):
    """One transformer block, its norms after the residual sums or, in stable form, before the branches."""

    def __init__(self, layer: Any, stable: bool) -> None:
        super().__init__()
        self.stable = stable
        self.attention = SelfAttention(layer.attention)
        self.attention_norm = layer.layer_norm
        self.expand = Dense.of(layer.feed_forward.intermediate_dense)
        self.activation = layer.feed_forward.intermediate_act_fn
        self.contract = Dense.of(layer.feed_forward.output_dense)
        self.feed_forward_norm = layer.final_layer_norm

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.contract(self.activation(self.expand(x)))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.stable:
            x = x + self.attention(self.attention_norm(x), lengths)
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = self.attention_norm(x + self.attention(x, lengths))
        return self.feed_forward_norm(x + self.feed_forward(x))


class InferenceGraph(nn.Module):
    """A transformers encoder, and its head if it has one, in the form that is exported.

    Takes over the parameters of ``encoder``; neither copy is meant to be trained afterwards.

    Shape:
        - waveform: (batch, samples) float32; the content beyond an utterance's length is ignored, NaN included.
        - lengths: (batch,) int64, samples.
        - returns: ``last_hidden_state`` (batch, frames, hidden), zero in the padding; ``frame_lengths`` (batch,);
          ``embedding`` (batch, hidden), the mean over the valid frames; with a head ``logits`` (batch, labels).
    """

    def __init__(self, encoder: Any, conv: ConvStack, normalise: bool, head: nn.Module | None = None) -> None:
        super().__init__()
        self.config = encoder.config
        self.stride = conv.stride
        self.receptive_field = conv.receptive_field
        self.padded_receptive_field = conv.padded_receptive_field
        self.normalise = Normalise() if normalise else None
        surplus = conv.stride // conv.strides[0]
        conv_layers = [ConvLayer(layer, surplus) for layer in encoder.feature_extractor.conv_layers]
        self.conv_layers = nn.ModuleList(conv_layers)
        #: Frames beyond the longest utterance's, of which only conv 0 sees anything.
        self.surplus = int(conv_layers[0].grouped)
        self.first_kernel = conv.kernels[0]
        self.projection_norm = encoder.feature_projection.layer_norm
        self.projection = Dense.of(encoder.feature_projection.projection)
        self.position = PositionalConv(encoder.encoder.pos_conv_embed)
        self.stable: bool = encoder.config.do_stable_layer_norm
        self.norm = encoder.encoder.layer_norm
        self.layers = nn.ModuleList(EncoderLayer(layer, self.stable) for layer in encoder.encoder.layers)
        self.head = head

    def num_frames(self, samples: Tensor) -> Tensor:
        """``ConvStack.num_frames`` in tensor arithmetic."""
        return (samples + (self.stride - self.receptive_field)).clamp(min=0).div(self.stride, rounding_mode="trunc")

    def forward(self, waveform: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        if self.normalise is not None:
            waveform = self.normalise(waveform, lengths)
        else:
            waveform = torch.where(valid(lengths, waveform.shape[1]).squeeze(2), waveform, 0.0)
        last_hidden_state, frame_lengths = self.encode(waveform, lengths)
        embedding = last_hidden_state.sum(1) / count(frame_lengths).squeeze(2)
        outputs = {LAST_HIDDEN_STATE: last_hidden_state, FRAME_LENGTHS: frame_lengths, EMBEDDING: embedding}
        return outputs if self.head is None else outputs | {LOGITS: self.head(embedding)}

    def encode(
        self, waveform: Tensor, lengths: Tensor, statistics: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised waveform, zero in the padding, to ``last_hidden_state`` and ``frame_lengths``.

        ``statistics`` are those of the group norm, where they are not the utterance's own.
        """
        frame_lengths = self.num_frames(lengths)
        frames = self.num_frames(torch.as_tensor(waveform.shape[1]))
        mask = valid(frame_lengths, frames)

        x = F.pad(waveform, (0, self.padded_receptive_field + self.stride))
        x = x[:, : (frames + self.surplus - 1) * self.stride + self.padded_receptive_field, None]
        for conv_layer in self.conv_layers:
            x = conv_layer(x, lengths, statistics)
        x = torch.where(mask, self.projection(self.projection_norm(x)), 0.0)

        x = x + self.position(x)
        if not self.stable:
            x = self.norm(x)
        for layer in self.layers:
            x = layer(x, frame_lengths)
        if self.stable:
            x = self.norm(x)
        return torch.where(mask, x, 0.0), frame_lengths


class WindowGraph(InferenceGraph):
    """The same encoder for windows of a long recording, which share the whole recording's statistics.

    Shape: ``waveform`` (batch, samples), ``lengths`` (batch,), ``moments`` (batch, 2 + k + k²), laid out as
    ``w2v_models.manifest.MOMENTS`` says → ``last_hidden_state`` (batch, frames, hidden), ``frame_lengths`` (batch,).
    """

    def __init__(self, graph: InferenceGraph) -> None:
        # The same parameters, under the same names; the exporter leaves its own ``forward`` on an instance.
        self.__dict__ = {name: value for name, value in graph.__dict__.items() if name != "forward"}

    def forward(  # type: ignore[override]
        self, waveform: Tensor, lengths: Tensor, moments: Tensor
    ) -> dict[str, Tensor]:
        mean, scale = moments[:, :1], torch.ones_like(moments[:, :1])
        if self.normalise is None:
            mean = torch.zeros_like(mean)
        else:
            scale = 1 / torch.sqrt(moments[:, 1:2] + NORMALISATION_EPSILON)
        mask = valid(lengths, waveform.shape[1]).squeeze(2)
        statistics = None
        if self.surplus:
            kernel = self.first_kernel
            frame_mean = ((moments[:, 2 : 2 + kernel] - mean) * scale)[:, None, :]
            covariance = moments[:, 2 + kernel :].reshape(-1, kernel, kernel) * (scale * scale)[:, :, None]
            statistics = frame_mean, covariance
        last_hidden_state, frame_lengths = self.encode(
            torch.where(mask, (waveform - mean) * scale, 0.0), lengths, statistics
        )
        return {LAST_HIDDEN_STATE: last_hidden_state, FRAME_LENGTHS: frame_lengths}


class HeadGraph(nn.Module):
    """A head alone: the mean over all frames, ``embedding`` (batch, hidden) → ``logits`` (batch, labels)."""

    def __init__(self, graph: InferenceGraph) -> None:
        super().__init__()
        self.config, self.head = graph.config, graph.head

    def forward(self, embedding: Tensor) -> dict[str, Tensor]:
        assert self.head is not None
        return {LOGITS: self.head(embedding)}
