"""A server of its parts: for the command line, and for tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import RocketKVConfig
from ..hf.models import find_decoder
from ..hf.prompts import longest
from .api import Api
from .app import create_app
from .contexts import Contexts
from .engine import Engine
from .jobs import Limits
from .metrics import Metrics
from .prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server; `rocketkv serve --help` describes them.

    Attributes:
        name: name of the model in requests.
        host: address at which it listens.
        key: API key, or None.
        contexts: folder of context files, or None.
        prefix_bytes: most bytes of prefixes.
        body_bytes: most bytes of a request's body.
        input_tokens: most tokens of a prompt; None: as many as the model accepts.
        output_tokens: most tokens of an answer.
        seconds: longest time of a request.
        waiting: requests that may wait.
        methods: methods that a request may choose, in addition to the server's.
        token_budget: largest budget of a request; None: the server's.
        max_error: least `max_error` of a request; None: the server's.
    """

    name: str
    host: str = "127.0.0.1"
    key: str | None = None
    contexts: Path | None = None
    prefix_bytes: int = 2**30
    body_bytes: int = 2**24
    input_tokens: int | None = None
    output_tokens: int = 2048
    seconds: float = 600.0
    waiting: int = 16
    methods: tuple[str, ...] = ()
    token_budget: int | None = None
    max_error: float | None = None


def build(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RocketKVConfig, settings: ServerSettings
) -> ASGIApp:
    """Return the application of a server.

    Args:
        model: a patched model.
        tokenizer: its tokenizer.
        config: the settings of the patch.
        settings: of the server.

    Raises:
        NotADirectoryError: there is no such folder of context files.
        ValueError: messages cannot be found in the model's chat template.
    """
    decoder_config: Any = find_decoder(model)[0].config
    most = longest(model.config)
    limits = Limits(
        input_tokens=min(most, settings.input_tokens or most),
        output_tokens=settings.output_tokens,
        model_tokens=most,
        seconds=settings.seconds,
        waiting=settings.waiting,
        methods=tuple(dict.fromkeys((config.method, *settings.methods))),
        token_budget=settings.token_budget or config.token_budget,
        max_error=config.max_error if settings.max_error is None else settings.max_error,
    )
    prompts = Prompts(tokenizer, decoder_config.get_text_config().vocab_size)
    if prompts.chats:
        prompts.refuse_template()
    engine = Engine(model, tokenizer, config, limits=limits, prefix_bytes=settings.prefix_bytes, metrics=Metrics())
    api = Api(engine, prompts, Contexts(settings.contexts), settings.name)
    return create_app(api, host=settings.host, key=settings.key, body_bytes=settings.body_bytes)
