"""The rollout engine of the embedded host: a Hugging Face causal LM that takes requests in the shape of SGLang's.

It does as SGLang 0.5.15 does in what training depends on:

* An answer ends by `max_new_tokens`, else by an end-of-sequence token or one of `stop_token_ids`; `ignore_eos` switches
  off both kinds. The ending token belongs to `output_ids` and the log-probs; `text` has it only with `no_stop_trim`.
* Log-probs are of softmax(logits / temperature), before top-k and top-p; of softmax(logits) where the choice is greedy.
* top-k and top-p are both taken from the whole distribution; a token is kept while those before it hold at most top_p.
* Routing that the server does not record is left out of the answer, without an error.
* With a draft it decodes speculatively (`speculation.py`), and counts as SGLang does; log-probs and routing are of the
  target's passes. Unlike SGLang's, whose random numbers no seed of a request reaches, an answer with a `sampling_seed`
  is that of plain decoding.

Unlike SGLang it refuses what it does not know: a field that is ignored is a wrong number later.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins.embedded.draft import LAYERS_KEY, Draft, is_of_draft, tensors_of_draft
from miles_plugins.embedded.generate_request import (
    GenerateRequest,
    Sampling,
    checked_sampling,
    is_int,
    listed,
    one_each,
    refusal,
    refuse_unknown,
    refuse_unsupported,
    request_ids,
)
from miles_plugins.embedded.hugging_face import (
    check_model_folder,
    checkpoint_places,
    expert_ids,
    find_routers,
    is_quantized,
    load_model,
    load_tokenizer,
    read_tensors,
    require_known_fusion,
)
from miles_plugins.embedded.speculation import Row, speculate
from miles_plugins.embedded.token_choice import ending_tokens, token_chooser
from miles_plugins.errors import ArgumentError, PluginError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass
class ServerArgs:
    """The part of SGLang's ServerArgs that plugins look at."""

    model_path: str
    device: str
    dtype: str
    random_seed: int
    enable_return_routed_experts: bool
    weight_version: str = "default"
    speculative_algorithm: str | None = None
    speculative_num_steps: int | None = None
    speculative_eagle_topk: int | None = None
    speculative_num_draft_tokens: int | None = None
    speculative_draft_model_path: str | None = None


class Answer(dict[str, Any]):
    """What answers a request for one prompt.

    Attributes:
        routing: [prompt + completion - 1, all layers, topk] int32 on the CPU, as it was recorded, before any plugin
            encoded it; zeros for layers without experts. None when none was asked for.
    """

    routing: torch.Tensor | None = None


class RolloutEngine:
    """Generates with a causal LM of `transformers`, and takes new weights for it; one call at a time.

    Args:
        folder: a Hugging Face checkpoint with its tokenizer.
        on_request: called with `server_args` and each request before anything is computed; may change the request.
        encode: makes the text of `routed_experts` from [tokens, MoE layers, topk] ids, uint8 up to 256 experts and
            int16 above; None for SGLang's own.
        receive: makes of arriving weights, also of a quantized checkpoint's, those that are loaded.
        built: called with the model of `transformers`, before a quantized checkpoint's weights are loaded; and with the
            draft's.
        draft_is_trained: weight updates are of the draft as well; else they pass it by.

    Raises:
        ArgumentError: the folder or an argument of the server cannot be used.
        UpstreamError: `transformers` cannot be imported, or its model keeps routers or experts in an unknown way.
    """

    def __init__(
        self,
        folder: str | Path,
        server_args: ServerArgs,
        on_request: Callable[[ServerArgs, GenerateRequest], None] = lambda *_: None,
        encode: Callable[[torch.Tensor], str | None] = lambda _: None,
        receive: Callable[[Iterable[tuple[str, torch.Tensor]]], Iterable[tuple[str, torch.Tensor]]] = iter,
        built: Callable[[Any], None] = lambda _: None,
        draft_is_trained: bool = False,
    ) -> None:
        import torch

        check_model_folder(folder)
        self.server_args = server_args
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, server_args.dtype, server_args.device)
        self._routers = find_routers(self.model)
        require_known_fusion(self.model)  # before a plugin makes its layers compute something else
        built(self.model)
        self._on_request = on_request
        self._encode = encode
        self._receive = receive
        self._lock = threading.Lock()  # a generation never sees two weight versions
        self.draft = self._load_draft(folder) if server_args.speculative_algorithm else None
        if self.draft is not None:
            built(self.draft.module)
        self._draft_is_trained = self.draft is not None and draft_is_trained
        if is_quantized(folder):
            self.update_weights(read_tensors(Path(folder)).items(), server_args.weight_version)
        if server_args.enable_return_routed_experts and not self._routers:
            raise refusal("routing cannot be recorded: the model has no experts", folder)
        eos = (self.model.config.eos_token_id, self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        self._eos = {token for ids in eos for token in ([ids] if isinstance(ids, int) else ids or ())}
        self._random = torch.Generator().manual_seed(server_args.random_seed)

    def _load_draft(self, folder: str | Path) -> Draft:
        args = self.server_args
        chain = (args.speculative_algorithm, args.speculative_eagle_topk, args.speculative_num_draft_tokens)
        steps = args.speculative_num_steps or 0
        if chain not in {(name, 1, steps + 1) for name in ("EAGLE", "NEXTN")} or steps < 1:
            found = f"{chain[0]} with {steps} steps, top-k {chain[1]}, {chain[2]} draft tokens"
            raise refusal("speculation of this kind is not supported", found, "EAGLE with top-k 1 and steps + 1 tokens")
        source = Path(args.speculative_draft_model_path or folder)
        draft = Draft(self.model)
        check_model_folder(source)
        tensors = tensors_of_draft(source, self.model.config.num_hidden_layers)
        draft.load(dict(self._receive(tensors.items())) if is_quantized(source) else tensors, source)
        return draft

    # -- generate ----------------------------------------------------------------------------------------------------

    def generate(self, payload: Mapping[str, Any]) -> Answer | list[Answer]:
        """Answer one `/generate` request: a dict for one prompt, a list in the prompts' order for a batch.

        Without `sampling_seed` the random numbers are the engine's own; with it a prompt's are those of the seed,
        whatever else is in the batch. `meta_info` carries `output_token_logprobs` ([log-prob, id, None] a token) and
        `routed_experts` where they are asked for: what `encode` makes of them, else base64 of int32
        [prompt + completion - 1, all layers, topk] in C order, zeros for dense layers; the last token is never
        forwarded.

        Raises:
            ArgumentError: a field that is not understood, or a value out of range; nothing was computed.
            PluginError: the model's output is not finite.
        """
        with self._lock:
            started = time.perf_counter()
            refuse_unknown("field", payload, {field.name for field in fields(GenerateRequest)})
            request = GenerateRequest(**payload)
            try:
                self._on_request(self.server_args, request)
            except AttributeError as error:
                raise PluginError(
                    "a plugin's receive_engine_request failed",
                    {"error": error, "fields": ", ".join(field.name for field in fields(GenerateRequest))},
                    "the embedded engine has only these of SGLang's fields",
                ) from error
            refuse_unsupported(request)
            prompts, single = self._prompts(request)
            samplings = [checked_sampling(params) for params in one_each(request.sampling_params or {}, len(prompts))]
            rids = request_ids(request.rid, len(prompts), single)
            self._check_lengths(prompts, samplings)
            recorded = bool(request.return_routed_experts) and self.server_args.enable_return_routed_experts
            answers = self._decode(prompts, samplings, recorded)
            for rid, answer in zip(rids, answers, strict=True):
                if not request.return_logprob:
                    del answer["meta_info"]["output_token_logprobs"]
                answer["meta_info"] |= {"id": rid, "e2e_latency": time.perf_counter() - started}
        return answers[0] if single else answers

    def _prompts(self, request: GenerateRequest) -> tuple[list[list[int]], bool]:
        """The token ids of each prompt, and whether the request is of one prompt rather than of a batch."""
        if (request.text is None) == (request.input_ids is None):
            raise refusal("a request needs either text or input_ids", "none" if request.text is None else "both")
        given: Any = request.text if request.input_ids is None else request.input_ids
        single = isinstance(given, str) or (isinstance(given, list) and given != [] and is_int(given[0]))
        prompts = [given] if single else given
        if not isinstance(prompts, list) or not prompts:
            raise refusal("a request needs at least one prompt", given, "a prompt, or a list of prompts")
        if request.text is not None:
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise refusal("text is not of the right kind", given, "a string, or a list of strings")
            prompts = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        last = self.model.config.vocab_size - 1
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, list) or not prompt or not all(map(is_int, prompt)):
                raise refusal(f"prompt {number} is not of the right kind", prompt, "a non-empty list of token ids")
            if min(prompt) < 0 or max(prompt) > last:
                found, advice = (
                    f"{min(prompt)} to {max(prompt)}",
                    "tokenize with the tokenizer of the model's own folder",
                )
                raise refusal(f"prompt {number} has ids out of the vocabulary", found, f"0 to {last}", advice)
        return prompts, single

    def _check_lengths(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling]) -> None:
        longest = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            if len(prompt) + sampling.max_new_tokens > longest:
                raise refusal(
                    f"prompt {number} would become a sequence longer than the model allows",
                    f"{len(prompt)} prompt tokens + {sampling.max_new_tokens} new tokens",
                    f"at most {longest} (max_position_embeddings in {self.server_args.model_path}/config.json)",
                    "lower max_new_tokens (--rollout-max-response-len), or leave longer prompts out",
                )

    def _decode(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], record: bool) -> list[Answer]:
        """Generate for all prompts at once, left-padded.

        A row that has ended stays in the batch; what it yields from there on is left out.
        """
        import torch

        device, rows, width = self.model.device, len(prompts), max(map(len, prompts))
        limits = torch.tensor([sampling.max_new_tokens for sampling in samplings], device=device)
        steps = max(int(limits.max()), 1)
        padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        ids = torch.tensor([[*[0] * (width - len(prompt)), *prompt] for prompt in prompts], device=device)
        mask = (torch.arange(width + steps, device=device) >= padding[:, None]).long()
        positions = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
        choose = token_chooser(samplings, self._random, device)
        ends = ending_tokens(samplings, self._eos).to(device)
        draft_steps = self.server_args.speculative_num_steps or 0
        with torch.inference_mode(), self._recording(record) as routing:
            if self.draft is None:
                found, slots = self._decode_plainly(ids, mask, positions, choose, limits, ends), mask.bool()
            else:
                prompt_slots = mask[:, :width].bool()
                found, slots = speculate(self.model, self.draft, draft_steps, ids, prompt_slots, choose, limits, ends)
        if not all(map(math.isfinite, (log_prob for row in found for log_prob in row.log_probs))):
            facts = {"weight_version": self.server_args.weight_version, "prompts": rows}
            raise PluginError("the rollout model's output is not finite", facts, "look at the last training steps")
        experts = self._stacked(routing, rows) if record else None
        answers = []
        for row, decoded in enumerate(found):
            answers.append(self._answer(len(prompts[row]), samplings[row], decoded.tokens, decoded.log_probs))
            answers[-1]["meta_info"] |= decoded.counts(draft_steps)
            if experts is not None:
                own = experts[row][slots[row, : experts.shape[1]].cpu()]  # the last token was never forwarded
                kept = own[: len(prompts[row]) + len(decoded.tokens) - 1].contiguous()
                answers[-1].routing = kept
                answers[-1]["meta_info"]["routed_experts"] = self._encoded(kept)
        return answers

    def _decode_plainly(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        choose: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
        limits: torch.Tensor,
        ends: torch.Tensor,
    ) -> list[Row]:
        """One token a pass; `mask` [rows, width + steps] is of the slots that there will be."""
        import torch

        width, tokens, log_probs = ids.shape[1], [], []
        lengths, alive, cache = torch.zeros_like(limits), limits > 0, None
        for step in range(mask.shape[1] - width):
            output = self.model(
                input_ids=ids,
                attention_mask=mask[:, : width + step],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            token, log_prob = choose(output.logits[:, -1].float(), step)
            tokens.append(token)
            log_probs.append(log_prob)
            lengths += alive
            alive = alive & (lengths < limits) & ~(token[:, None] == ends).any(-1)
            if not alive.any():
                break
            ids, positions, cache = token[:, None], positions[:, -1:] + 1, output.past_key_values
        decoded = (torch.stack(each, dim=1).tolist() for each in (tokens, log_probs))
        return [Row(ids[:n], of_ids[:n]) for ids, of_ids, n in zip(*decoded, lengths.tolist(), strict=True)]

    def _encoded(self, routing: torch.Tensor) -> str:
        import torch

        narrow = torch.uint8 if self.model.config.num_experts <= 256 else torch.int16
        text = self._encode(routing[:, sorted(self._routers)].to(narrow))
        return base64.b64encode(routing.numpy().tobytes()).decode() if text is None else text

    def _answer(self, prompt: int, sampling: Sampling, ids: list[int], log_probs: list[float]) -> Answer:
        by_length = len(ids) == sampling.max_new_tokens  # comes first, as in SGLang, also where the last token ends it
        text = self.tokenizer.decode(
            ids if by_length or sampling.no_stop_trim else ids[:-1],
            skip_special_tokens=sampling.skip_special_tokens,
            spaces_between_special_tokens=sampling.spaces_between_special_tokens,
        )
        meta_info = {
            "finish_reason": {"type": "length", "length": len(ids)}
            if by_length
            else {"type": "stop", "matched": ids[-1]},
            "prompt_tokens": prompt,
            "completion_tokens": len(ids),
            "cached_tokens": 0,
            "weight_version": self.server_args.weight_version,
            "output_token_logprobs": [[log_prob, token, None] for log_prob, token in zip(log_probs, ids, strict=True)],
        }
        return Answer(text=text, output_ids=ids, meta_info=meta_info)

    @contextmanager
    def _recording(self, record: bool) -> Iterator[dict[int, list[torch.Tensor]]]:
        """layer -> what its router chose, one [tokens of the pass, topk] int32 a forward pass."""
        chosen: dict[int, list[torch.Tensor]] = {layer: [] for layer in self._routers}

        def hook(layer: int) -> Callable[..., None]:
            return lambda module, inputs, output: chosen[layer].append(expert_ids(output).int())

        with ExitStack() as hooks:
            for layer, router in self._routers.items() if record else ():
                hooks.callback(router.register_forward_hook(hook(layer)).remove)
            yield chosen

    def _stacked(self, routing: Mapping[int, Sequence[torch.Tensor]], rows: int) -> torch.Tensor:
        """[rows, padded tokens, all layers, topk] int32 on the CPU; zeros for the layers that have no router."""
        import torch

        layers = {
            layer: torch.cat([ids.reshape(rows, -1, ids.shape[-1]) for ids in passes], dim=1)
            for layer, passes in routing.items()
        }
        blank = torch.zeros_like(next(iter(layers.values())))
        every = [layers.get(layer, blank) for layer in range(self.model.config.num_hidden_layers)]
        return torch.stack(every, dim=2).cpu()

    # -- weights -----------------------------------------------------------------------------------------------------

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], weight_version: str) -> None:
        """Take new values for every parameter, under its name in a Hugging Face checkpoint (one tensor an expert).

        They pass `receive` first. The iterable is consumed once and lazily; its tensors may be reused after each step.
        All or nothing: the values wait in the model's dtype, and are copied into place when all have come. A draft that
        is trained takes its own, which must be there. Those of one that is not, or not here, are left out.

        Raises:
            PluginError: a name is unknown, came twice or is missing, or a tensor has another shape, no floating dtype,
                or is not finite in the model's. Weights and version stay what they were.
        """
        import torch

        places = {**checkpoint_places(self.model), **self._draft_places()}
        problems: dict[str, list[str]] = {}
        came: dict[str, torch.Tensor] = {}
        for name, tensor in self._receive(named_tensors):
            if name not in places and self._passes_by(name):
                continue
            if name not in places:
                problems.setdefault("unknown", []).append(name)
                continue
            if name in came:
                problems.setdefault("came twice", []).append(name)
            came[name], place = tensor, places[name]
            if tensor.shape != place.shape:
                problem = f"{name} {tuple(tensor.shape)}, expected {tuple(place.shape)}"
                problems.setdefault("wrong shape", []).append(problem)
            elif not tensor.is_floating_point():
                problems.setdefault("not floating point", []).append(f"{name} {tensor.dtype}")
            else:
                came[name] = torch.empty_like(place).copy_(tensor.detach())
                if not came[name].isfinite().all():
                    problems.setdefault("not finite", []).append(name)
        if missing := [name for name in places if name not in came]:
            problems["missing"] = missing
        if problems:
            raise PluginError(
                f"the weights of version {weight_version} do not fit the rollout model; it keeps the old ones",
                {problem: listed(names) for problem, names in problems.items()},
                "the trainer must export every parameter once, under its name in the model's own checkpoint",
            )
        with self._lock, torch.no_grad():
            for name, place in places.items():
                place.copy_(came[name])
            self.server_args.weight_version = weight_version

    def _draft_places(self) -> dict[str, torch.Tensor]:
        return self.draft.places() if self.draft is not None and self._draft_is_trained else {}

    def _passes_by(self, name: str) -> bool:
        """Whether a tensor is of a draft that takes none."""
        config = self.model.config
        drafts = bool(getattr(config, LAYERS_KEY, None)) and not self._draft_is_trained
        return drafts and is_of_draft(name, config.num_hidden_layers)

    # -- HTTP --------------------------------------------------------------------------------------------------------

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Answer POST /generate, GET /health and GET /get_model_info on a free port of this machine; yields the URL.

        A refused request gets status 400, a failed one 500, each with `{"error": {"message": ...}}`.
        """
        server = _Server(("127.0.0.1", 0), _Handler)
        server.engine = self
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="embedded-engine")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()  # waits for the requests that are being answered
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for them
    request_queue_size = 128
    engine: RolloutEngine


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "miles-plugins-embedded"
    timeout = 10  # seconds of silence, after which a connection no longer holds up the server's end

    def do_POST(self) -> None:
        self._send(*self._generate())

    def _generate(self) -> tuple[int, object]:
        if self.path != "/generate":
            return 404, self.path
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            if not isinstance(body, dict):
                raise refusal("the body is not a JSON object", body)
            return 200, self.server.engine.generate(body)
        except (ArgumentError, json.JSONDecodeError, UnicodeDecodeError) as error:
            return 400, str(error)
        except Exception as error:  # whatever it is, the client is told, and the server goes on
            logger.exception("a request to the embedded engine failed")
            return 500, f"{type(error).__name__}: {error}"

    def do_GET(self) -> None:
        args, config = self.server.engine.server_args, self.server.engine.model.config
        info = {"model_path": args.model_path, "is_generation": True, "weight_version": args.weight_version}
        info |= {"model_type": config.model_type, "architectures": config.architectures}
        pages = {"/health": {}, "/get_model_info": info}
        self._send(200, pages[self.path]) if self.path in pages else self._send(404, self.path)

    def _send(self, status: int, content: object) -> None:
        body = json.dumps(content if status == 200 else {"error": {"message": content}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug(format, *args)
