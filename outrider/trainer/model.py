"""The policy and its reference: Hugging Face models with float32 master weights."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from outrider.contract.errors import UserError
from outrider.contract.identity import model_fingerprint
from outrider.contract.manifest import DTypeName
from outrider.trainer.config import ModelConfig
from outrider.trainer.exchange import Exchange
from outrider.trainer.layout import PEERS, Seat, first_row
from outrider.trainer.loading import fill, load_model, make_empty
from outrider.trainer.logprobs import Head, token_logprobs
from outrider.trainer.packing import Flat, MicroBatch, Rows
from outrider.trainer.ranks import Ranks
from outrider.trainer.sharding import Whole, blocks_of, give_up_gathered, hold_until_last, local, may_hold, shard
from outrider.trainer.sharing import PADDING, Sharing, find_sharing, shared_mask
from outrider.trainer.tensor_parallel import Plan, join_gradients, over_peers, plan_of, split
from outrider.trainer.varlen import VARLEN, bounds_of, kernel_takes

#: Tokens of a sequence at which variable-length attention costs as much as the linear layers, in hidden sizes: 6 by
#: operations, and at about the speed of a matrix product.
FLAT_BREAK_EVEN = 6.0


class Found(msgspec.Struct):
    """What rank 0 has found out about a model while it had all of it."""

    problem: str = ""
    sharing: Sharing | None = None
    flat: bool = False


class Policy:
    """A causal language model that gives log-probabilities of the trained tokens of a micro-batch."""

    def __init__(
        self,
        config: ModelConfig,
        source: str,
        temperature: float,
        chunk: int,
        trainable: bool,
        ranks: Ranks | None = None,
        flat: bool | None = None,
    ) -> None:
        """source: directory or hub id of the weights. chunk: tokens projected onto the vocabulary at once. ranks: that
        share the weights, None for this one alone; all of them call this. flat: as another policy is, whose
        micro-batches this one computes; None: as it can be. Raises UserError when the model cannot be
        loaded, or is not of a kind whose logits we can reproduce."""
        mesh = None if ranks is None else ranks.mesh
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.temperature, self.chunk = temperature, chunk
        compute = _compute_dtype(config, device)
        self._home, self._compute = device, compute
        self._autocast = compute if compute != torch.float32 and mesh is None else None
        self.config = load_config(config, source)
        #: How far rollouts of one prompt may share a row; what the policy can do, its reference can do as well.
        self.sharing: Sharing | None = None
        #: Whether weights are gathered from shares, and then stay gathered over the micro-batches of a step.
        self._sharded, self._holds = False, False
        #: Of the ranks that compute layers together, and how the model says that they do; None without any.
        self._peers = None if ranks is None or ranks.peer_mesh is None else ranks.peer_mesh[PEERS]
        self._plan: Plan = {}
        #: Whether micro-batches are flat.
        self.flat = bool(flat)
        self._may_be_flat = flat is None and (
            config.attn_impl == "varlen"
            or (config.attn_impl is None and device.type == "cuda" and compute != torch.float32)
        )
        self.model: PreTrainedModel
        # Optimizer steps are smaller than bfloat16 can add to a weight.
        dtype = torch.float32 if trainable else compute
        # What the model can do is found out on the CPU, where there is a whole one.
        self.device = torch.device("cpu")
        if ranks is None or mesh is None:
            self._use(load_model(config, source, dtype), config, trainable)
            self._check(config, source, trainable)
            self.model.to(device)
        else:
            whole = self._load_and_check(config, source, dtype, trainable, ranks)
            self._use(make_empty(config, self.config, dtype), config, trainable)
            if self._peers is not None:
                self._plan = plan_of(self.model, self._peers.size())
                split(self.model, self._plan, self._peers)
            reshards = config.fsdp_reshard_after_forward
            if reshards is None:
                reshards = config.fsdp_cpu_offload or not may_hold(self.model, mesh, compute)
            gathered = compute if compute != torch.float32 else None
            shard(self._whole, mesh, gathered, config.fsdp_cpu_offload, not reshards, ranks.peer_mesh)
            self._sharded, self._holds = True, not reshards
            fill(self._whole, whole, ranks, device, config.fsdp_cpu_offload)
        self.device = device
        if self.flat:
            self.model.set_attn_implementation(VARLEN)
        if config.torch_compile if config.torch_compile is not None else self.flat and device.type == "cuda":
            for block in blocks_of(self.model):
                block.forward = torch.compile(block.forward)

    def _use(self, model: PreTrainedModel, config: ModelConfig, trainable: bool) -> None:
        self.model = model
        model.requires_grad_(trainable)
        model.train(trainable)
        _switch_off_dropout(model)
        if trainable and config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._whole = Whole(model, self._logprobs)

    def _load_and_check(
        self, config: ModelConfig, source: str, dtype: torch.dtype, trainable: bool, ranks: Ranks
    ) -> PreTrainedModel | None:
        """The whole model on rank 0, in host memory; what it can do, on all of them."""
        whole, found = None, Found()
        if ranks.leads:
            try:
                whole = load_model(config, source, dtype)
                self._use(whole, config, trainable)
                self._check(config, source, trainable)
                found.sharing, found.flat = self.sharing, self.flat
            except UserError as error:
                found.problem = str(error)
        found = msgspec.json.decode(ranks.gather(msgspec.json.encode(found))[0], type=Found)
        if found.problem and not ranks.leads:
            raise SystemExit(2)  # rank 0 says it
        if found.problem:
            raise UserError(found.problem)
        self.sharing, self.flat = found.sharing, found.flat
        return whole

    def _check(self, config: ModelConfig, source: str, trainable: bool) -> None:
        self._check_projection(source)
        if self._peers is not None:
            plan_of(self.model, self._peers.size())
        if self._may_be_flat:
            self.flat = self._can_be_flat() and kernel_takes(self.config, self._compute, self._home)
            if config.attn_impl == "varlen" and not self.flat:
                raise UserError(
                    f"--attn_impl varlen: {type(self.model).__name__} gives other hidden states with it, or has heads "
                    "that it does not take; give --attn_impl sdpa"
                )
        if trainable and not self.flat:
            self.sharing = find_sharing(self.config, self._attention, self._hidden, self.device)

    @property
    def break_even(self) -> float:
        """Tokens of a sequence at which attention costs as much as the linear layers."""
        if self.flat:
            return FLAT_BREAK_EVEN * self.config.get_text_config().hidden_size
        return self.sharing.break_even if self.sharing else math.inf

    @property
    def fingerprint(self) -> str:
        """See :func:`outrider.contract.identity.model_fingerprint`."""
        return model_fingerprint(self.config.to_dict())

    def published_tensors(self) -> dict[str, Tensor]:
        """This rank's part of the weights by name, tied ones once."""
        return {name: local(parameter.data) for name, parameter in self.model.named_parameters()}

    def exchange(self, seat: Seat, dtype: DTypeName) -> Exchange:
        """The rows that the rank at ``seat``, this one, publishes."""
        return Exchange(dict(self.model.named_parameters()), seat, getattr(torch, dtype), self._peers)

    def first_rows(self, seat: Seat) -> dict[str, int]:
        """Where the rows begin that the rank at ``seat`` publishes."""
        return {name: first_row(parameter, seat) for name, parameter in self.model.named_parameters()}

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole weights by name."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def begin_micro_batch(self, last: bool) -> None:
        """Before a forward and backward pass; last: of those whose gradients one optimizer step takes."""
        if self._holds:
            hold_until_last(self._whole, last)

    def end_step(self) -> None:
        """Before gradients are used, and the optimizer changes the weights."""
        if self._sharded:
            give_up_gathered(self._whole)
        if self._peers is not None:
            join_gradients(self.model, self._plan, self._peers)

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities of the trained tokens; float32 [tokens]. With shards, all ranks call it as often."""
        logprobs, _ = self._whole(batch, False)
        return logprobs

    def logprobs_and_entropy(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The same, and the entropy of the distributions that they are of, which has no gradient; float32 [tokens]."""
        return self._whole(batch, True)

    def _logprobs(self, batch: MicroBatch, entropy: bool) -> tuple[Tensor, Tensor | None]:
        with self._precision():
            hidden = self._of_layout(batch)
            # Not hidden[where]: rollouts share the place that predicts their first token, and the backward pass of
            # indexing adds what comes to one place in an order that several threads leave open.
            chosen = embedding(batch.where, hidden.flatten(0, 1))

            def project(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
                return token_logprobs(hidden, targets, self._head, self.temperature, self.chunk, entropy)

            if self._peers is None:
                return project(chosen, batch.targets)
            return over_peers(project, chosen, batch.targets, self._peers)

    def _of_layout(self, batch: MicroBatch) -> Tensor:
        match batch.layout:
            case Flat(bounds=bounds, longest=longest):
                return self._hidden(batch.input_ids, None, batch.positions, **bounds_of(bounds, longest))
            case Rows(part=part, shared=True):
                return self._hidden(batch.input_ids, shared_mask(part, self._attention), batch.positions)
            case Rows(part=part):
                return self._hidden(batch.input_ids, part.ne(PADDING).long(), None)

    def _hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, **more: Any
    ) -> Tensor:
        """Hidden states before the vocabulary projection; [rows, width, hidden]. attention_mask: [rows, width], or
        that of a shared row. position_ids: [rows, width], None where they just count. more: for the attention."""
        base = self.model.get_decoder()
        places = {} if position_ids is None else {"position_ids": position_ids}
        found = base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **places, **more)
        return found.last_hidden_state

    @property
    def _attention(self) -> str:
        return str(self.model.config._attn_implementation)

    @property
    def _head(self) -> Head:
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None), getattr(self.config, "final_logit_softcapping", None))

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        if self._autocast is None:
            yield
        else:
            with torch.autocast(self.device.type, dtype=self._autocast):
                yield

    @torch.no_grad()
    def _check_projection(self, source: str) -> None:
        """Our way to the logits must be the model's own: some architectures scale them in ways of their own."""
        ids = torch.arange(1, 9, device=self.device)[None] % self.config.get_text_config().vocab_size
        with self._precision():
            expected = self.model(input_ids=ids, use_cache=False).logits.float()
            found = self._head.logits(self._hidden(ids, torch.ones_like(ids), None)).float()
        if not torch.allclose(expected, found, rtol=1e-2, atol=1e-2):
            raise UserError(
                f"--model {source}: {type(self.model).__name__} computes its logits in a way that this trainer does "
                "not reproduce (they differ from hidden states times output embeddings); it cannot be trained here"
            )

    @torch.no_grad()
    def _can_be_flat(self) -> bool:
        """Whether sequences one after the other have the hidden states that they have each in a row of its own."""
        ids = torch.arange(1, 10) % self.config.get_text_config().vocab_size
        parts = ids.split((3, 6))
        with self._precision():
            expected = torch.cat([self._hidden(part[None], torch.ones_like(part)[None], None)[0] for part in parts])
            before = self._attention
            self.model.set_attn_implementation(VARLEN)
            positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
            try:
                found = self._hidden(
                    ids[None], None, positions, **bounds_of(torch.tensor([0, 3, 9], dtype=torch.int32), 6)
                )[0]
            except (ValueError, TypeError, RuntimeError):
                return False
            finally:
                self.model.set_attn_implementation(before)
        tolerance = 1e-4 if found.dtype == torch.float32 else 0.03
        return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def load_config(config: ModelConfig, source: str) -> PretrainedConfig:
    """The configuration of the model in ``source``. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {source}: cannot be loaded: {error}") from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of --model, which goes into every checkpoint. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {config.model}: its tokenizer cannot be loaded: {error}") from error


def _compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    if config.torch_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.torch_dtype)


def _switch_off_dropout(model: nn.Module) -> None:
    """The policy that is trained must be the one that was sampled from, which has no dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
