"""Let SGLang speculate without a GPU, with one proposal at each step (hook: choose_device).

SGLang's EAGLE worker is Python, and runs as it is. What a CPU lacks are the kernels that the worker calls, here plain
torch (miles_plugins/cpu_rehearsal/chain.py), and attention in passes that draft or verify, here `torch_native`'s. More
than one proposal at a step would make a tree, for which `torch_native` has no mask: that is refused.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from miles_plugins.cpu_rehearsal import chain
from miles_plugins.errors import ArgumentError
from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patching import Patch, has_attribute

if TYPE_CHECKING:
    from torch import Tensor

SGLANG = "https://github.com/sgl-project/sglang/blob/v0.5.15.post1/python/sglang/srt/speculative"
GPU_KERNELS = "sgl_kernel"


# -- attention -------------------------------------------------------------------------------------------------------


def extend(
    original: Callable[..., Any], self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """To verify a chain is to extend each sequence by it; the lengths of that are told in another way."""
    if batch.forward_mode.is_target_verify():
        import torch

        lengths = batch.seq_lens
        batch = copy.copy(batch)
        batch.extend_prefix_lens = lengths
        batch.extend_seq_lens = torch.full_like(lengths, batch.spec_info.draft_token_num)
        batch.seq_lens = lengths + batch.extend_seq_lens
    return original(self, q, k, v, layer, batch, *args, **kwargs)


def draft_attention(original: Callable[..., Any], self: Any) -> Any:
    """One backend for each token that the draft decodes; None if it decodes none, having proposed one before."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    runner, steps = self.draft_model_runner, self.speculative_num_steps
    if not isinstance(runner.attn_backend, TorchNativeAttnBackend):
        return original(self)
    require_chain(self.server_args)

    class Step(TorchNativeAttnBackend):  # type: ignore[misc]
        def __init__(self, number: int) -> None:
            super().__init__(runner)
            self.number = number

        def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            """`seq_lens` is that of the sequence before all steps; each has added a token, as this one has."""
            batch = copy.copy(batch)
            batch.seq_lens = batch.seq_lens + self.number
            return super().forward_decode(q, k, v, layer, batch, *args, **kwargs)

    class Steps(TorchNativeAttnBackend):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(runner)
            self.attn_backends = [Step(number) for number in range(1, steps)]

        def init_forward_metadata(self, forward_batch: Any) -> None:
            for backend in self.attn_backends:
                backend.init_forward_metadata(forward_batch)

    return Steps() if steps > 1 else None


def draft_extend_attention(original: Callable[..., Any], self: Any) -> Any:
    """None: the draft's own backend does."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    return None if isinstance(self.draft_model_runner.attn_backend, TorchNativeAttnBackend) else original(self)


def require_chain(server_args: Any) -> None:
    """Raise ArgumentError for a tree, and for what samples otherwise than `chain.accept_by_chance` does."""
    allowed: dict[str, Any] = {
        "speculative_eagle_topk": 1,
        "speculative_accept_threshold_single": 1.0,
        "speculative_accept_threshold_acc": 1.0,
        "speculative_use_rejection_sampling": False,
    }
    found = {name: getattr(server_args, name) for name in allowed}
    wrong = {f"--sglang-{name.replace('_', '-')}": value for name, value in found.items() if value != allowed[name]}
    if wrong:
        raise ArgumentError(
            "on a CPU, SGLang verifies one proposal at each step, and exactly",
            wrong,
            "give --sglang-speculative-eagle-topk 1, and leave the other flags out",
        )


# -- kernels ---------------------------------------------------------------------------------------------------------


def build_tree(
    original: Callable[..., Any],
    bonus_tokens: Tensor,
    parent_list: Any,
    top_scores_index: Any,
    draft_tokens: Tensor,
    seq_lens: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """The mask comes first, and is empty: `torch_native` does not read it."""
    import torch

    tokens = torch.cat((bonus_tokens[:, None], draft_tokens), dim=1)
    return torch.empty(0, dtype=torch.bool), *chain.tree(seq_lens, tokens.shape[1]), tokens.flatten()


def verify_greedily(
    original: Callable[..., Any],
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    *args: Any,
    target_predict: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Without a kernel, SGLang's own answers with what happens to be in memory."""
    answer = predicts, accept_index, accept_token_num
    _write(chain.accept_greedily(candidates, target_predict), *answer)
    return answer


def verify_by_chance(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    **kwargs: Any,
) -> None:
    """What `tree_speculative_sampling_target_only` does, with its names."""
    accepted = chain.accept_by_chance(
        candidates, target_probs, uniform_samples, last_coins=uniform_samples_for_final_sampling
    )
    _write(accepted, predicts, accept_index, accept_token_num)


def _write(accepted: chain.Accepted, predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor) -> None:
    """Fill SGLang's tensors: the token after each that was verified, the numbers of those that stay, and how many."""
    import torch

    steps = torch.arange(accept_index.shape[1])
    stays = steps <= accepted.drafts[:, None]
    numbers = steps + len(steps) * torch.arange(len(stays))[:, None]
    predicts.copy_(torch.where(stays, accepted.tokens, 0).flatten())
    accept_index.copy_(torch.where(stays, numbers, -1))
    accept_token_num.copy_(accepted.drafts)


def sample(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _kernels():
        return original(*args, **kwargs)


@contextmanager
def _kernels() -> Iterator[None]:
    """Within it, a package with the three kernels can be imported: SGLang does so each time that it samples."""
    package: Any = ModuleType(GPU_KERNELS)
    package.top_k_renorm_prob, package.top_p_renorm_prob = chain.keep_top_k, chain.keep_top_p
    package.tree_speculative_sampling_target_only = verify_by_chance
    installed = sys.modules.get(GPU_KERNELS)
    sys.modules[GPU_KERNELS] = package
    try:
        yield
    finally:
        del sys.modules[GPU_KERNELS]
        if installed is not None:
            sys.modules[GPU_KERNELS] = installed


# -- places in the cache ---------------------------------------------------------------------------------------------


def read_places(
    original: Callable[..., Any],
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Without a kernel, SGLang's own answers with nothing."""
    return req_to_token[chain.places(req_pool_indices, start_offset, end_offset)].long()


def write_places(
    original: Callable[..., Any],
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    *args: Any,
    **kwargs: Any,
) -> None:
    places = chain.places(req_pool_indices, start_offset, end_offset)
    req_to_token[places] = out_cache_loc.to(req_to_token.dtype)


def prepare_for_draft(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.speculative.triton_ops import cache_locs

    with _in_place_of(cache_locs, "assign_draft_cache_locs_contiguous", _launched(_draft_places)):
        return original(self, *args, **kwargs)


def verify(original: Callable[..., Any], self: Any, batch: Any) -> Any:
    from sglang.srt.speculative import eagle_worker_v2

    with _in_place_of(eagle_worker_v2, "fill_bonus_tokens", _launched(_last_tokens)):
        return original(self, batch)


@contextmanager
def _in_place_of(module: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


def _launched(function: Callable[..., None]) -> Any:
    """A plain function as Triton's kernels are launched, `kernel[grid](...)`, whatever the grid."""
    return defaultdict(lambda: function)


def _draft_places(  # these two have the kernels' parameters
    rows: Tensor, table: Tensor, lengths: Tensor, found: Tensor, width: int, topk: int, steps: int
) -> None:
    found.copy_(table[chain.places(rows, lengths, lengths + topk * steps)])


def _last_tokens(tokens: Tensor, counts: Tensor, found: Tensor, width: int) -> None:
    found.copy_(tokens.view(-1, width).gather(1, counts.long()[:, None] - 1)[:, 0])


# -- the GPU ---------------------------------------------------------------------------------------------------------


def share_head(original: Callable[..., Any], self: Any) -> None:
    """The draft's model waits for the GPU when it has taken the target's embedding and head."""
    import torch

    with _in_place_of(torch.cuda, "synchronize", lambda device=None: None):
        original(self)


def move_nothing(original: Callable[..., Any], self: Any) -> None:
    """SGLang tries out a kernel that moves what was accepted; of a chain that is where it belongs already.

    With None in this place, SGLang says so itself if it were to move something.
    """
    self._kv_copy_config = None


# -- seam ------------------------------------------------------------------------------------------------------------


def _patch(name: str, target: str, wrap: Callable[..., Any], signature: str) -> Patch:
    return Patch(
        id=f"sglang.cpu.speculation.{name}",
        target=f"sglang.srt.{target}",
        wrap=wrap,
        signature=signature,
        reason="SGLang's EAGLE has its kernels, and the attention that it allows, for GPUs only",
        upstream=f"{SGLANG}/eagle_worker_v2.py",
        retire_when="SGLang speculates on a CPU",
    )


_PLACES = "speculative.triton_ops.cache_locs"

SEAMS = (
    Seam(
        name="speculation on the cpu",
        hooks=("choose_device",),
        only_in=frozenset({"sglang_child"}),
        patches=(
            _patch(
                "verify-attention",
                "layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_extend",
                extend,
                "(self, q, k, v, layer, forward_batch, save_kv_cache=True)",
            ),
            _patch(
                "draft-attention",
                "speculative.draft_utils:DraftBackendFactory.create_decode_backend",
                draft_attention,
                "(self)",
            ),
            _patch(
                "draft-extend-attention",
                "speculative.draft_utils:DraftBackendFactory.create_draft_extend_backend",
                draft_extend_attention,
                "(self)",
            ),
            _patch(
                "tree",
                "speculative.eagle_utils:build_tree_kernel_efficient",
                build_tree,
                "(bonus_tokens, parent_list, top_scores_index, draft_tokens, seq_lens, seq_lens_sum, topk, spec_steps, "
                "num_verify_tokens, tree_mask_mode=0, tree_mask_buf=None, position_buf=None)",
            ),
            _patch(
                "verify-greedily",
                "speculative.eagle_utils:verify_tree_greedy_func",
                verify_greedily,
                "(predicts, accept_index, accept_token_num, candidates, retrieve_index, retrieve_next_token, "
                "retrieve_next_sibling, target_predict, topk=-1)",
            ),
            _patch(
                "verify-by-chance",
                "speculative.eagle_utils:eagle_sample",
                sample,
                "(verify_input, batch, logits_output, vocab_mask=None)",
            ),
            _patch(
                "verify-places",
                f"{_PLACES}:assign_extend_cache_locs_func",
                read_places,
                "(req_pool_indices, req_to_token, start_offset, end_offset, batch_size, draft_token_num, device)",
            ),
            _patch(
                "new-places",
                f"{_PLACES}:assign_req_to_token_pool_func",
                write_places,
                "(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, batch_size)",
            ),
            _patch(
                "draft-places",
                "speculative.base_spec_worker:EagleDraftWorkerBase.prepare_for_draft",
                prepare_for_draft,
                "(self, draft_input, req_to_token_pool, batch, cuda_graph_runner, draft_model_runner, topk, num_steps)",
            ),
            _patch("last-tokens", "speculative.eagle_worker_v2:EAGLEWorkerV2.verify", verify, "(self, batch)"),
            _patch("head", "speculative.eagle_worker_v2:EagleDraftWorker.init_lm_head", share_head, "(self)"),
            _patch(
                "cache-moves",
                "mem_cache.memory_pool:MHATokenToKVPool._init_kv_copy_and_warmup",
                move_nothing,
                "(self)",
            ),
        ),
        variants=(
            Variant(
                "SGLang before 0.5.15",  # which refuses to speculate on a CPU
                (),
                has=(has_attribute("sglang.srt.speculative.eagle_info_v2"),),
                lacks=(has_attribute(f"sglang.srt.{_PLACES}"),),
            ),
            Variant(
                "SGLang from 0.5.23",  # likewise
                (),
                has=(has_attribute("sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func"),),
                lacks=(has_attribute(f"sglang.srt.{_PLACES}"),),
            ),
        ),
    ),
)
