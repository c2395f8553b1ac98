"""Requests and responses: the fields of OpenAI's API that this server has, and its own under the name `rocketkv`.

A field that is not listed is refused: it would ask for something that the server does not do.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MOST_MESSAGES = 1024
MOST_PARTS = 256
MOST_STOPS = 16
LONGEST_STOP = 256

Number = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Strict(BaseModel):
    """A part of a request: unknown fields and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class TextPart(Strict):
    """A part of a message's text; the server can return to the end of each part."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MOST_PARTS)]
    name: None = None
    tool_calls: None = None
    refusal: None = None

    @property
    def parts(self) -> list[str]:
        """The texts of the message's parts, without empty ones."""
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return [text for text in texts if text]


class StreamOptions(Strict):
    """Parts of a stream in addition to the text.

    Attributes:
        include_usage: a last chunk with the usage.
        continuous_usage_stats: the usage so far in the chunks, twice a second.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Compression(Strict):
    """Settings of the compression in place of the server's, within its limits."""

    method: str | None = None
    token_budget: int | None = None
    max_error: Number | None = None


class Sampling(Strict):
    """Fields that both kinds of requests have.

    Attributes:
        model: name of the model.
        max_tokens: most tokens of the answer.
        temperature: 0 for the most likely token; None: the model's generation config decides, as in `generate`.
        top_p: nucleus sampling; None as above.
        top_k: most likely tokens to sample from; None as above.
        seed: of sampled tokens; None for a random one.
        stop: texts that end the answer, and are not in it.
        stream: whether the text comes while it is generated.
        stream_options: for streams.
        context: id of a context file that the prompt continues.
        rocketkv: settings of the compression; not together with `context`, whose file has settings.
        return_token_ids: whether the response has the token ids of prompt and answer.
        user: ignored.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    context: Id | None = None
    rocketkv: Compression | None = None
    return_token_ids: bool = False
    user: str | None = None
    # Accepted only with the values that change nothing, which some clients always send.
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return 0 if isinstance(value, float) and value == 0 else value

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampling):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    tools: None = None
    tool_choice: Literal["none"] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of the answer; the newer name of the field goes first."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampling):
    """A request to /v1/completions."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def new_tokens(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens
