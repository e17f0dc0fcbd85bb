"""The policy and its reference: Hugging Face models with float32 master weights."""

import contextlib
from collections.abc import Iterator

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
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
from outrider.trainer.config import ModelConfig
from outrider.trainer.loading import fill, load_model, make_empty
from outrider.trainer.logprobs import token_logprobs
from outrider.trainer.packing import MicroBatch
from outrider.trainer.ranks import Ranks
from outrider.trainer.sharding import Whole, local, shard
from outrider.trainer.sharing import PADDING, Sharing, find_sharing, shared_mask


class Found(msgspec.Struct):
    """What rank 0 has found out about a model while it had all of it."""

    problem: str = ""
    sharing: Sharing | None = None


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
    ) -> None:
        """source: directory or hub id of the weights. chunk: tokens projected onto the vocabulary at once. ranks: that
        share the weights, None for this one alone; all of them call this. Raises UserError when the model cannot be
        loaded, or is not of a kind whose logits we can reproduce."""
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.temperature, self.chunk = temperature, chunk
        compute = _compute_dtype(config, self.device)
        self._autocast = compute if compute != torch.float32 else None
        self.config = load_config(config, source)
        # Optimizer steps are smaller than bfloat16 can add to a weight.
        dtype = torch.float32 if trainable else compute
        #: How far rollouts of one prompt may share a row; what the policy can do, its reference can do as well.
        self.sharing: Sharing | None = None
        self.model: PreTrainedModel
        if ranks is None or ranks.mesh is None:
            self._use(load_model(config, source, dtype).to(self.device), config, trainable)  # type: ignore[arg-type]
            self._check(source, trainable)
        else:
            self._load_share(config, source, dtype, trainable, ranks, ranks.mesh)

    def _use(self, model: PreTrainedModel, config: ModelConfig, trainable: bool) -> None:
        self.model = model
        model.requires_grad_(trainable)
        model.train(trainable)
        _switch_off_dropout(model)
        if trainable and config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._whole = Whole(model, self._logprobs)

    def _load_share(
        self, config: ModelConfig, source: str, dtype: torch.dtype, trainable: bool, ranks: Ranks, mesh: DeviceMesh
    ) -> None:
        """This rank's rows of every parameter. Rank 0 has the model in host memory meanwhile, and checks it there."""
        whole, found = None, Found()
        if ranks.leads:
            device, self.device = self.device, torch.device("cpu")
            try:
                whole = load_model(config, source, dtype)
                self._use(whole, config, trainable)
                self._check(source, trainable)
                found.sharing = self.sharing
            except UserError as error:
                found.problem = str(error)
            self.device = device
        found = msgspec.json.decode(ranks.gather(msgspec.json.encode(found))[0], type=Found)
        if found.problem and not ranks.leads:
            raise SystemExit(2)  # rank 0 says it
        if found.problem:
            raise UserError(found.problem)
        self.sharing = found.sharing
        self._use(make_empty(config, self.config, dtype), config, trainable)
        offload = config.fsdp_cpu_offload
        shard(self._whole, mesh, self._autocast, offload)
        fill(self.model, whole, ranks, self.device, offload)

    def _check(self, source: str, trainable: bool) -> None:
        self._check_projection(source)
        if trainable:
            self.sharing = find_sharing(self.config, self._attention, self._hidden, self.device)

    @property
    def fingerprint(self) -> str:
        """See :func:`outrider.contract.identity.model_fingerprint`."""
        return model_fingerprint(self.config.to_dict())

    def published_tensors(self) -> dict[str, Tensor]:
        """This rank's rows of the weights by name, tied ones once."""
        return {name: local(parameter.data) for name, parameter in self.model.named_parameters()}

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole weights by name."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities of the trained tokens; float32 [tokens]. With shards, all ranks call it as often."""
        return self._whole(batch)

    def _logprobs(self, batch: MicroBatch) -> Tensor:
        with self._precision():
            if batch.shared:
                mask, positions = shared_mask(batch.part, self._attention), batch.positions
            else:
                mask, positions = batch.part.ne(PADDING).long(), None
            hidden = self._hidden(batch.input_ids, mask, positions)
            # Not hidden[where]: rollouts share the place that predicts their first token, and the backward pass of
            # indexing adds what comes to one place in an order that several threads leave open.
            chosen = embedding(batch.where, hidden.flatten(0, 1))
            return token_logprobs(chosen, batch.targets, self._project, self.temperature, self.chunk)

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None) -> Tensor:
        """Hidden states before the vocabulary projection; [rows, width, hidden]. attention_mask: [rows, width], or
        that of a shared row. position_ids: [rows, width], None where they just count."""
        base = self.model.get_decoder()
        places = {} if position_ids is None else {"position_ids": position_ids}
        return base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **places).last_hidden_state

    @property
    def _attention(self) -> str:
        return str(self.model.config._attn_implementation)

    def _project(self, hidden: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

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
            found = self._project(self._hidden(ids, torch.ones_like(ids), None)).float()
        if not torch.allclose(expected, found, rtol=1e-2, atol=1e-2):
            raise UserError(
                f"--model {source}: {type(self.model).__name__} computes its logits in a way that this trainer does "
                "not reproduce (they differ from hidden states times output embeddings); it cannot be trained here"
            )


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
