"""From a recipe's model group to Megatron's HybridModel: config, layer spec, and this rank's chunks of the model.

    ModelConfig, ParallelConfig, Backend --> TransformerConfig + spec --> [Model] one per virtual pipeline chunk

All backends use the same names in checkpoints: if a backend fuses norm and linear, the spec maps the fused names to the
separate ones.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid import hybrid_block, hybrid_model
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from recipes.schema.model import ModelConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import cut, kinds_of, layer_kinds
from recipes.schema.precision import PrecisionConfig
from recipes.schema.run import RunConfig
from train.model.activation import FeedForward, activation_function
from train.model.adapters import attach_adapters
from train.model.attention import AttentionCore
from train.model.backend import Backend
from train.model.checked_linears import attach_checks
from train.model.context import RowContext
from train.model.cross_entropy import cross_entropy_and_log_sums, soft_cap
from train.model.experts import ExpertLayer, router_options
from train.model.head import ScalarHead, hidden_states, likeliest_ids, token_rows
from train.model.initial import initialize
from train.model.media.encoders import MediaEncoders
from train.model.mtp import Ahead, Depth, depths_spec, window_options
from train.model.postnorm import PostNormAttention, PostNormMamba, PostNormMLP
from train.model.rotary import Rotary, score_factor
from train.parallel.mesh import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model(HybridModel):
    """Megatron's HybridModel with this project's cross-entropy, Gemma 2's scaling of embeddings and cap on logits, and the head
    of reward models."""

    def __init__(self, *, model: ModelConfig, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.logit_softcap = model.logit_softcap
        self.vocab_padding = model.vocab_padding
        self.temperature = 1.0
        """Of the distribution whose losses `forward` returns. Logits are always those of temperature 1."""
        self.has_scalar_head = model.head == "scalar"
        if self.has_scalar_head and self.post_process:
            # Megatron has no way to leave out its own, so for a moment there is a head for the vocabulary.
            device = self.decoder.final_norm.weight.device
            self.output_layer = ScalarHead(self.config, group=self.pg_collection.tp, device=device)
        if model.scale_embedding and hasattr(self, "embedding"):
            self.embedding.register_forward_hook(_times_root_of_hidden)
        # Megatron would run them in each forward pass, evaluation included, and add their losses to the gradient unseen.
        self.mtp_process = False
        if hasattr(self, "mtp") and self.share_embeddings_and_output_weights and not self.pre_process:
            # Megatron trap: it builds a head of its own next to the copy of the embedding, and cannot save it.
            self.output_layer.weight = None

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The embedding, or the head that is a copy of it; a stage with further depths has the embedding."""
        return (
            self.embedding.word_embeddings.weight
            if hasattr(self, "mtp")
            else super().shared_embedding_or_output_weight()
        )

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's; the last stage's copy of the embedding is not saved."""
        self.mtp_process = hasattr(self, "mtp")
        try:
            return super().sharded_state_dict(*args, **kwargs)
        finally:
            self.mtp_process = False

    def losses_of_depths(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        *,
        labels_BS: torch.Tensor,
        ahead: Ahead,
        context: RowContext | None,
    ) -> torch.Tensor:
        """The last stage: losses of the next token and of each further one, then whether each further guess is right (0 or 1),
        [1 + 2 depths, rows, sequence]. Other stages: their output. Collective over the tensor and context groups."""
        hidden_SBH = hidden_states(self, tokens_BS, positions_BS, context=context)
        if not self.post_process:
            return hidden_SBH
        losses: list[torch.Tensor] = []
        right: list[torch.Tensor] = []
        logits_of_depths = self._logits_of_depths(hidden_SBH, positions_BS, ahead=ahead, context=context)
        for label_BS, logits_SBV in zip([labels_BS, *ahead.labels_DBS], logits_of_depths, strict=True):
            if losses:
                right.append(likeliest_ids(self, logits_SBV).t() == label_BS)
            losses.append(self.compute_language_model_loss(label_BS, logits_SBV))
        return torch.stack([*losses, *(flags.to(losses[0].dtype) for flags in right)])

    def guesses_of_depths(
        self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, *, ahead: Ahead, context: RowContext | None
    ) -> torch.Tensor:
        """The last stage: the likeliest id of the next token and of each further one, [1 + depths, rows, sequence]. Other stages:
        their output. Collective over the tensor and context groups."""
        hidden_SBH = hidden_states(self, tokens_BS, positions_BS, context=context)
        if not self.post_process:
            return hidden_SBH
        logits_of_depths = self._logits_of_depths(hidden_SBH, positions_BS, ahead=ahead, context=context)
        return torch.stack([likeliest_ids(self, logits_SBV).t() for logits_SBV in logits_of_depths])

    def _logits_of_depths(
        self, hidden_SBH: torch.Tensor, positions_BS: torch.Tensor, *, ahead: Ahead, context: RowContext | None
    ) -> Iterator[torch.Tensor]:
        """Logits of the next token, then of each further one, as `_logits`."""
        yield self._logits(hidden_SBH)
        for depth, ids_BS in enumerate(ahead.tokens_DBS):
            embedded_SBH = self.embedding(input_ids=ids_BS, position_ids=positions_BS)
            hidden_SBH = self.depth(depth).further(hidden_SBH, embedded_SBH, context=context)
            yield self._logits(hidden_SBH)

    def losses_and_log_sums(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        *,
        labels_BS: torch.Tensor,
        context: RowContext | None,
    ) -> torch.Tensor:
        """The last stage: losses, and the log-sum-exps of the logits, [2, rows, sequence]. Other stages: their output. Collective
        over the tensor and context groups."""
        hidden_SBH = hidden_states(self, tokens_BS, positions_BS, context=context)
        if not self.post_process:
            return hidden_SBH
        return torch.stack(self._losses(labels_BS, self._logits(hidden_SBH)))

    def depth(self, depth: int) -> Depth:
        """The module of a further depth, from 0; with `model.mtp.repeated` always the same."""
        layers = self.mtp.layers
        return layers[min(depth, len(layers) - 1)]

    def _logits(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """The head's logits before the soft cap, [sequence, rows, vocabulary of this rank]."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_SBH, weight=weight)[0]

    def forward(
        self,
        *args: Any,
        labels: torch.Tensor | None = None,
        ahead: Ahead | None = None,
        log_sums: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Megatron's forward pass; without labels it returns logits (`capped`), with labels losses, with labels and `ahead` the
        losses of all depths (`losses_of_depths`), with `ahead` alone their guesses (`guesses_of_depths`), with labels and
        `log_sums` also the log-sum-exps of the logits (`losses_and_log_sums`).

        With a scalar head it returns rewards, fp32 [rows, sequence], and takes no labels.
        """
        assert labels is None or not self.has_scalar_head, "a reward model predicts no tokens"
        if ahead is not None or log_sums:
            tokens, positions, _mask = args
            context = kwargs["packed_seq_params"]
            if labels is None:
                assert ahead is not None, "log-sum-exps come with losses"
                return self.guesses_of_depths(tokens, positions, ahead=ahead, context=context)
            if ahead is None:
                return self.losses_and_log_sums(tokens, positions, labels_BS=labels, context=context)
            return self.losses_of_depths(tokens, positions, labels_BS=labels, ahead=ahead, context=context)
        if (row := kwargs.get("packed_seq_params")) is not None and row.media is not None:
            kwargs["packed_seq_params"] = row.without_media()
            if self.pre_process:
                embedded_SBH = self.embedding(input_ids=args[0], position_ids=args[1])
                kwargs["decoder_input"] = self.media.splice(embedded_SBH, row.media)
        output = super().forward(*args, labels=labels, **kwargs)
        if not self.post_process or labels is not None:
            return output
        return output.squeeze(-1) if self.has_scalar_head else self.capped(output)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """The head's logits [..., vocabulary of this rank] after the model's soft cap, if it has one; -inf, so probability 0,
        for rows that stand for no token."""
        return self.without_padding(logits if self.logit_softcap is None else soft_cap(logits, self.logit_softcap))

    def without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits after the soft cap; -inf, so probability 0, for rows that stand for no token."""
        slice_size = logits.shape[-1]
        real = token_rows(slice_size, self.vocab_padding, self.pg_collection.tp)
        if real == slice_size:
            return logits
        # After the cap, which would turn -inf into -cap. Not in place: autograd may need what is here.
        return logits.masked_fill(torch.arange(slice_size, device=logits.device) >= real, -torch.inf)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [rows, sequence], logits [sequence, rows, vocabulary of this rank] -> nats per token [rows, sequence].

        Collective over the tensor group.
        """
        return self._losses(labels, logits)[0]

    def _losses(self, labels_BS: torch.Tensor, logits_SBV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, log-sum-exps of the logits), each [rows, sequence]. Collective over the tensor group."""
        softcap = self.logit_softcap
        if self.temperature != 1:  # cap tanh(x / cap) / T = (cap / T) tanh((x / T) / (cap / T))
            logits_SBV, softcap = logits_SBV / self.temperature, softcap and softcap / self.temperature
        loss_SB, log_sum_SB = cross_entropy_and_log_sums(
            logits_SBV,
            labels_BS.t().contiguous(),
            group=self.pg_collection.tp,
            softcap=softcap,
            padding=self.vocab_padding,
        )
        return loss_SB.t(), log_sum_SB.t()


def _times_root_of_hidden(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Embeddings times sqrt(hidden); the factor is rounded to the embeddings' dtype, as in Gemma's own code."""
    return output * torch.tensor(output.shape[-1] ** 0.5, dtype=output.dtype, device=output.device)


def transformer_config(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    run: RunConfig,
    backend: Backend,
) -> TransformerConfig:
    """Megatron's configuration for a recipe. Megatron validates it again and fills in the rest."""
    kinds = layer_kinds(model.pattern)
    has_experts = "E" in kinds_of(model)
    dtype = DTYPES[precision.params]
    activation, gated = activation_function(model.activation)
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    return TransformerConfig(
        num_layers=len(kinds),
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        mamba_num_heads=model.mamba_heads,
        mamba_head_dim=model.mamba_head_dim,
        mamba_state_dim=model.mamba_state,
        mamba_num_groups=model.mamba_groups,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        layernorm_zero_centered_gamma=model.norm_offset == 1,
        softmax_scale=score_factor(model) / math.sqrt(model.query_scale or model.head_dim),
        **window_options(model, kinds),
        mtp_num_layers=model.mtp.depths or None,
        mtp_use_repeated_layer=model.mtp.repeated,
        add_bias_linear=False,
        activation_func=activation,
        gated_linear_unit=gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        is_hybrid_model=True,
        params_dtype=dtype,
        bf16=precision.params == "bf16",
        pipeline_dtype=dtype,
        # `train.model.initial` draws the same initial weights for every layout; Megatron's depend on the layout.
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        **(router_options(model.experts) if has_experts else {}),
        # With two stages and a virtual pipeline, batched messages to the one neighbour pair up wrongly and training goes
        # wrong without an error (docs/megatron.md); overlapped single messages do not.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        recompute_granularity="full" if parallel.recompute == "full" else None,
        recompute_method="uniform" if parallel.recompute == "full" else None,
        recompute_num_layers=1 if parallel.recompute == "full" else None,
        # Fused kernels that need Apex or a GPU.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **backend.options(model, precision),
    )


def stack_spec(model: ModelConfig, backend: Backend, *, reset_at_documents: bool = False) -> ModuleSpec:
    """Megatron's spec of the layer stack, naming the backend's modules."""
    # An adapter needs the normalized input of its linear, which a fused module does not show.
    fused = None if model.lora.rank else backend.column_parallel_layer_norm_linear()
    column = fused if fused is not None else backend.column_parallel_linear()
    norm = IdentityOp if fused is not None else backend.norm()
    row = backend.row_parallel_linear()

    def names(fused_linear: str, separate_norm: str) -> dict[str, str]:
        return {f"{fused_linear}.layer_norm_": f"{separate_norm}."} if fused is not None else {}

    after = {"norm": backend.norm()} if model.post_norms else {}
    mamba = ModuleSpec(
        module=PostNormMamba if model.post_norms else MambaLayer,
        params=after,
        submodules=MambaLayerSubmodules(
            norm=norm,
            mixer=ModuleSpec(
                module=backend.mixer(),
                params={"chunk_size": model.mamba_chunk, "d_conv": model.mamba_conv},
                submodules=MambaMixerSubmodules(in_proj=column, out_proj=row),
            ),
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names("mixer.in_proj", "norm"),
        ),
    )
    attention = ModuleSpec(
        module=PostNormAttention if model.post_norms else TransformerLayer,
        params=after,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=_attention_core(model, backend, reset_at_documents=reset_at_documents),
                    linear_proj=row,
                    # Megatron finds them by these names when it sums gradients over tensor ranks.
                    q_layernorm=backend.norm() if model.qk_norm else None,
                    k_layernorm=backend.norm() if model.qk_norm else None,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names("self_attention.linear_qkv", "input_layernorm"),
        ),
    )
    mlp = ModuleSpec(
        module=PostNormMLP if model.post_norms else MLPLayer,
        params=after,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=partial(FeedForward.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names("mlp.linear_fc1", "pre_mlp_layernorm"),
        ),
    )
    experts = ModuleSpec(
        module=PostNormMLP if model.post_norms else MLPLayer,
        params=after,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=backend.norm(),
            mlp=partial(
                ExpertLayer,
                experts=model.experts,
                shared=MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=row),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=mamba,
            attention_layer=attention,
            mlp_layer=mlp,
            moe_layer=experts,
            mtp_block_spec=depths_spec(model, norm=backend.norm(), linear=backend.column_parallel_linear()),
        ),
    )


def _attention_core(model: ModelConfig, backend: Backend, *, reset_at_documents: bool) -> Any:
    """The backend's attention core, or this project's if the model needs a soft cap, rotary positions or documents: stock
    cores have no soft cap and do not separate documents by index."""
    core = backend.core_attention()
    needs_own = model.attention_softcap is not None or model.position == "rope" or reset_at_documents
    if core is not AttentionCore and not needs_own:
        return core
    rotary = Rotary(model) if model.position == "rope" else None
    return partial(AttentionCore, softcap=model.attention_softcap, rotary=rotary)


def build_model(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    run: RunConfig,
    row_tokens: int,
    mesh: Mesh,
    backend: Backend,
    reset_at_documents: bool = False,
    draw_weights: bool = True,
) -> list[Model]:
    """This rank's part of the model, initialized: one chunk per virtual pipeline stage, first stage first.

    reset_at_documents: whether batches carry document boundaries.

    Weights depend on `run.seed` and the parameter's name only, not on the layout. draw_weights=False leaves them
    uninitialized, for a caller that loads all of them from a checkpoint. Collective (tied embeddings).
    """
    config = transformer_config(model, parallel=parallel, precision=precision, run=run, backend=backend)
    # Megatron trap: HybridStack takes its final norm from the module-level name TENorm and ignores the spec.
    hybrid_block.TENorm = backend.norm()
    spec = stack_spec(model, backend, reset_at_documents=reset_at_documents)
    chunks_per_rank = parallel.virtual_pipeline
    stages = parallel.pipeline * chunks_per_rank
    # Megatron's patterns have one kind of attention layer; its config (window_attn_skip_freq) says which have a window.
    depths = "".join(f"/{model.mtp.pattern}" for _ in range(model.mtp.depths))
    pattern = ("|".join(cut(model.pattern, stages, model=model)) + depths).replace("w", "*")
    pipeline_rank = mesh.groups.pp.rank()
    chunks = []
    for chunk in range(chunks_per_rank):
        stage = chunk * parallel.pipeline + pipeline_rank
        is_last = stage == stages - 1
        # Megatron trap: HybridModel looks for the last stage in global process groups, which do not exist here.
        hybrid_model.mtp_on_this_rank = lambda *, mtp_num_layers, is_last=is_last, **_: is_last and bool(mtp_num_layers)
        part = Model(
            model=model,
            config=config,
            hybrid_stack_spec=spec,
            vocab_size=model.vocab,
            max_sequence_length=row_tokens,
            hybrid_layer_pattern=pattern,
            pre_process=stage == 0,
            post_process=is_last,
            parallel_output=True,
            share_embeddings_and_output_weights=not model.has_own_head,
            position_embedding_type="none",  # the attention core applies rotary positions itself
            pg_collection=mesh.groups,
            vp_stage=chunk if chunks_per_rank > 1 else None,
        )
        if run.integrity.enabled:
            attach_checks(part, pattern=model.pattern, kinds=run.integrity.products)
        backend.equip(part, model=model, precision=precision)
        if part.pre_process and model.has_encoders:
            part.media = MediaEncoders(model, decoder=config, groups=mesh.groups)
        attach_adapters(part, model)
        if draw_weights:
            initialize(part, model=model, seed=run.seed, tensor_group=mesh.groups.tp)
        chunks.append(part)
    return chunks
