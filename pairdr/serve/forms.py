"""What is asked and answered. A form says what a field is; how much of it is allowed, `service` says by its options."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from pairdr.records import Passage
from pairdr.store_config import Mode

_UNFIT = re.compile("[\x00\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _require_clean(text: str) -> str:
    if _UNFIT.search(text):
        raise ValueError("half a character (a lone surrogate) or a NUL is no text")
    return text


def _require_text(text: str) -> str:
    if not _require_clean(text).strip():
        raise ValueError("must not be empty")
    return text


def _require_id(text: str) -> str:
    if _CONTROL.search(_require_text(text)) or text != text.strip():
        raise ValueError("an id has no line breaks, tabs or spaces around it")
    return text


def _describe(pattern: str) -> WithJsonSchema:
    """Say in the document what a text is; the validator says it in words."""
    return WithJsonSchema({"type": "string", "pattern": pattern})


Text = Annotated[str, AfterValidator(_require_text), _describe(r"^[^\u0000]*[^\s\u0000][^\u0000]*$")]
AnyText = Annotated[str, AfterValidator(_require_clean), _describe(r"^[^\u0000]*$")]
Id = Annotated[
    str,
    AfterValidator(_require_id),
    _describe(r"^[^\s\u0000-\u001f\u007f]([^\u0000-\u001f\u007f]*[^\s\u0000-\u001f\u007f])?$"),
]


class Form(BaseModel):
    """A body that is sent: of the kinds that it names, and with no other fields."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _forbid_others(cls, value: Any) -> Any:
        """Refuse the first other field; pydantic would note every one of a body that has nothing else."""
        known = {field.alias or name for name, field in cls.model_fields.items()}
        other = next((name for name in value if name not in known), None) if isinstance(value, dict) else None
        if other is not None:
            raise ValueError(f"there is no field {str(other)[:100]!r}")
        return value


class OpenForm(BaseModel):
    """A body in another service's form: fields that mean nothing here are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class SearchForm(Form):
    """One question, or several."""

    query: Text | None = Field(None, description="The question.")
    queries: Annotated[list[Text], Field(fail_fast=True)] | None = Field(
        None, description="Several questions, in place of one.", min_length=1
    )
    k: int | None = Field(None, ge=1, description="Passages per question; unset: 10.")
    mode: Mode = Field("auto", description="auto is the model's own: what won on dev.")
    rerank: bool = Field(False, description="Let the reranker put the best passages into a new order.")
    filters: Annotated[list[Text], Field(fail_fast=True)] = Field(
        [], description="FIELD=VALUE of the metadata; a field that is named twice may have either value."
    )
    fold: bool = Field(False, description="Show passages with the same words once.")
    model: AnyText | None = Field(None, description="One of /v1/models; unset: the first.")

    @model_validator(mode="after")
    def _require_one(self) -> SearchForm:
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either query or queries")
        return self

    @property
    def questions(self) -> list[str]:
        """Return the questions."""
        return [self.query] if self.query is not None else self.queries or []


class Hit(BaseModel):
    """A found passage."""

    id: str
    score: float
    title: str
    text: str
    metadata: dict[str, Any]


class Found(BaseModel):
    """What was found for a question, best first."""

    query: str
    hits: list[Hit]


class SearchAnswer(BaseModel):
    """What was found, and by which version of what."""

    model: str
    version: str
    mode: Literal["dense", "bm25", "hybrid"]
    reranked: bool
    milliseconds: float
    results: list[Found]


def _name_input(value: Any) -> str:
    return "texts" if isinstance(value, list) else "text"


class EmbeddingForm(OpenForm):
    """OpenAI's form, and which side the texts are of."""

    input: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("texts")],
        Discriminator(_name_input),
    ] = Field(description="A text, or several.")
    model: AnyText | None = Field(None, description="One of /v1/models; unset: the first.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Only the widths that the model was trained for.")
    input_type: Literal["query", "document"] = Field("document", description="Lengths and prefixes are of this side.")

    @property
    def texts(self) -> list[str]:
        """Return the texts."""
        return [self.input] if isinstance(self.input, str) else self.input


class Embedding(BaseModel):
    """The vector of a text; as base64, of little-endian 32-bit floats."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that were read, those that a long text was cut by not among them."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    """OpenAI's form."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    version: str
    usage: Usage


class Document(OpenForm):
    """A text to be judged."""

    text: Text
    title: AnyText = ""


def _name_document(value: Any) -> str:
    return "text" if isinstance(value, str) else "document"


class RerankForm(OpenForm):
    """Cohere's and Jina's form."""

    query: Text
    documents: Annotated[
        list[
            Annotated[
                Annotated[Text, Tag("text")] | Annotated[Document, Tag("document")], Discriminator(_name_document)
            ]
        ],
        Field(fail_fast=True),
    ] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False
    model: AnyText | None = Field(
        None, description="'reranker', or a model whose similarities are taken; unset: the reranker where there is one."
    )

    @property
    def passages(self) -> list[Passage]:
        """Return the documents as passages whose ids are their places."""
        given = [Document(text=d) if isinstance(d, str) else d for d in self.documents]
        return [Passage(str(place), document.title, document.text) for place, document in enumerate(given)]


class Judged(BaseModel):
    """A document's place in what was sent, and its score."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankAnswer(BaseModel):
    """The best documents, best first."""

    model: str
    version: str
    results: list[Judged]


class PassageForm(Form):
    """A line of corpus.jsonl."""

    id: Id = Field(alias="_id")
    text: Text
    title: AnyText = ""
    metadata: dict[str, Any] = {}


class UpsertForm(Form):
    """Passages that are new, or have another text."""

    passages: Annotated[list[PassageForm], Field(fail_fast=True)] = Field(min_length=1)


class DeleteForm(Form):
    """Ids of passages that go."""

    ids: Annotated[list[Id], Field(fail_fast=True)] = Field(min_length=1)


class WriteAnswer(BaseModel):
    """The version from which every search now answers."""

    version: str
    passages: int


class FeedbackForm(Form):
    """What somebody says of a found passage."""

    query: Text
    passage_id: Id
    relevant: bool | None = Field(description="null takes it back.")


class MarkForm(Form):
    """What somebody says of an audited label."""

    query_id: Text
    passage_id: Text
    mark: Literal["accept", "relabel", "drop", ""]


class ServedModel(BaseModel):
    """A model of /v1/models, in OpenAI's form."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "pairdr"


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    code: str


class ErrorAnswer(BaseModel):
    """The form of every error."""

    error: Problem
