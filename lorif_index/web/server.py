"""Server: the explorer's pages and JSON, on Starlette. Pages are rendered here; the script only shades tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlencode

from ..curvature.refine import Refine
from ..errors import ConfigError, DataError, LorifError, NonFiniteError
from ..version import VERSION
from .charts import by_source, family, layer_bars
from .explorer import MOST_EXPLAINED, MOST_HITS, Explorer, Found, Item, Side, WrittenQuestion
from .guard import HEADERS, Guard
from .page import plain_json, render, token_values

LONGEST_QUESTION = 20_000
"""Characters of a question, and of a prompt."""
PASSAGES = 50
"""That a search finds where its address does not say."""
BESIDE = 20
"""Of each of two questions side by side."""
RERANKED = 200
"""Passages that are computed again where a page is asked to."""
SOURCE, TEXT = "source", "text"
"""Fields that every passage may be filtered by, beside those of the payloads."""
_MOST_SOURCES = 200
_LARGEST_ID = 2**62


class Refused(Exception):
    """A request that cannot be answered: a status, and why in words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True)
class Asked:
    """A search as its address says it."""

    question: WrittenQuestion
    k: int = PASSAGES
    opponents: bool = False
    field: str = SOURCE
    has: str = ""
    rerank: int | None = None
    refine: bool = False

    @property
    def here(self) -> str:
        """The page that answers it."""
        return "/search" if self.question.row is None else "/neighbours"

    def values(self, **changes: Any) -> dict[str, Any]:
        """The values of its address, with some changes."""
        values = {
            "q": self.question.text,
            "prompt": self.question.prompt,
            "id": self.question.row,
            "k": self.k,
            "side": "opponents" if self.opponents else None,
            "field": self.field if self.has and self.field != SOURCE else None,
            "has": self.has or None,
            "rerank": self.rerank,
            "refine": 1 if self.refine else None,
        } | changes
        return {key: value for key, value in values.items() if value is not None}

    def address(self, path: str, **changes: Any) -> str:
        """The address of this search with some changes."""
        # Lone surrogates cannot come in an address, nor go out in one.
        return f"{path}?{urlencode(self.values(**changes), errors='replace')}"

    def keeps(self, item: Item) -> bool:
        """Whether the filter does: what is looked for is in the field, in whatever case."""
        payload = item.payload if isinstance(item.payload, dict) else {}
        value = {SOURCE: item.source, TEXT: item.text}.get(self.field, payload.get(self.field))
        words = value if isinstance(value, str) else "" if value is None else plain_json(value)
        return self.has.casefold() in words.casefold()


def make_app(explorer: Explorer, *, host: str = "127.0.0.1", names: Iterable[str] = (), shade: int = 10) -> Any:
    """The explorer as an ASGI app, guarded.

    Args:
        explorer: the index.
        host: what the server is bound to.
        names: further names that it goes by.
        shade: passages of a page whose tokens are shaded by themselves.

    Raises:
        ConfigError: Starlette or Jinja2 is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.base import BaseHTTPMiddleware
        from starlette.responses import PlainTextResponse
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles
    except ImportError:
        raise ConfigError(
            "serving needs Starlette, which is not installed: pip install starlette uvicorn jinja2 (the extra serve)"
        ) from None
    guard, pages = Guard(host, names), _Pages(explorer, shade)

    async def guarded(request: Any, answer: Any) -> Any:
        refused = guard.refusal(request.headers)
        response = await answer(request) if refused is None else PlainTextResponse(refused[1], refused[0])
        response.headers.update(HEADERS)
        return response

    routes = [
        Route("/", pages.endpoint(pages.home)),
        Route("/search", pages.endpoint(pages.search)),
        Route("/neighbours", pages.endpoint(pages.search)),
        Route("/compare", pages.endpoint(pages.compare)),
        Route("/passage", pages.endpoint(pages.passage)),
        Route("/api/search", pages.endpoint(pages.api_search, machine=True)),
        Route("/api/explain", pages.endpoint(pages.api_explain, machine=True)),
        Mount("/static", StaticFiles(packages=[(__package__, "static")])),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={404: pages.missing},
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guarded)],
    )


def serve(app: Any, *, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serves until it is interrupted.

    Args:
        app: of `make_app`.
        host, port: to bind to; port 0 takes a free one.
        started: told the address once it answers.

    Raises:
        ConfigError: uvicorn is not installed. OSError: the port is taken.
    """
    try:
        import uvicorn
    except ImportError:
        raise ConfigError(
            "serving needs uvicorn, which is not installed: pip install starlette uvicorn jinja2 (the extra serve)"
        ) from None
    import socket

    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=kind) as bound:
        shown = f"[{host}]" if ":" in host else host
        started(f"http://{shown}:{bound.getsockname()[1]}/")
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            date_header=False,
            proxy_headers=False,
            # Further ones are told to come again, with status 503.
            limit_concurrency=32,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=65536,
            http="h11",
            ws="none",
            lifespan="off",
        )
        uvicorn.Server(config).run(sockets=[bound])


class _Pages:
    """What each address answers."""

    def __init__(self, explorer: Explorer, shade: int) -> None:
        self._explorer, self._shade = explorer, shade

    # -- pages -----------------------------------------------------------------------------------------------------

    def home(self, values: _Values) -> Any:
        """The first page."""
        examples = [(label, Asked(question)) for label, question in self._explorer.examples()]
        asks = self._explorer.text_model is not None
        return self._html(
            "home.html",
            asks=asks,
            examples=[(label, asked.address(asked.here)) for label, asked in examples],
            default_k=PASSAGES,
            notes=[] if asks else [f"Texts cannot be asked about: {self._explorer.why}."],
        )

    def search(self, values: _Values) -> Any:
        """An answer, for a text or for a row."""
        asked, side, kept = self._answer(values)
        question, explorer = asked.question, self._explorer
        rows = [
            {
                "hit": hit,
                "passage": asked.address("/passage", row=hit.item.id),
                "neighbours": Asked(WrittenQuestion(row=hit.item.id), asked.k).address("/neighbours"),
            }
            for hit in kept
        ]
        shade = {"q": question.text, "prompt": question.prompt, "row": question.row}
        return self._html(
            "results.html",
            question=question,
            words=explorer.text_of(question),
            loss=explorer.loss(question),
            notes=[],
            k=asked.k,
            explains=explorer.text_model is not None,
            explain_address="/api/explain?" + urlencode({k: v for k, v in shade.items() if v is not None}),
            first_shaded=self._shade,
            side="opponents" if asked.opponents else "proponents",
            side_addresses=[asked.address(asked.here, side=side) for side in (None, "opponents")],
            rerank=asked.rerank,
            reranked=max(RERANKED, asked.k),
            refine=asked.refine,
            refined=Refine(),
            here=asked.here,
            kept=asked.values(field=None, has=None, rerank=None, refine=None),
            field=asked.field,
            fields=_fields(side.hits),
            has=asked.has,
            beside=None if explorer.text_model is None else asked.address("/compare", k=min(asked.k, BESIDE)),
            sources=sorted({family(h.item.source) for h in side.hits if h.item.source})[:_MOST_SOURCES],
            found=len(side.hits),
            matching=len(kept),
            hits=rows,
            largest=max((abs(hit.score) for hit in side.hits), default=0.0) or 1.0,
            as_json=asked.address("/api/search"),
            source_bars=by_source((hit.item.source, hit.score) for hit in kept),
            stats=side.stats,
        )

    def compare(self, values: _Values) -> Any:
        """Two questions side by side: what each found, and what both did."""
        first, sides = self._asked(values, BESIDE), []
        words = values.text("other", LONGEST_QUESTION)
        questions = [first.question]
        if words:
            questions.append(WrittenQuestion(words, values.text("other_prompt", LONGEST_QUESTION) or None))
        for question in questions:
            asked = replace(first, question=question)
            sides.append((asked, self._found(asked)))
        ranks = [{hit.item.id: hit.rank for hit in side.hits} for _, side in sides]
        columns = [
            {
                "question": asked.question,
                "words": self._explorer.text_of(asked.question),
                "loss": self._explorer.loss(asked.question),
                "address": asked.address(asked.here),
                "hits": [
                    {
                        "hit": hit,
                        "there": ranks[1 - place].get(hit.item.id) if len(ranks) == 2 else None,
                        "passage": asked.address("/passage", row=hit.item.id),
                    }
                    for hit in side.hits
                ],
                "largest": max((abs(hit.score) for hit in side.hits), default=0.0) or 1.0,
                "bars": by_source((hit.item.source, hit.score) for hit in side.hits),
            }
            for place, (asked, side) in enumerate(sides)
        ]
        return self._html(
            "compare.html",
            columns=columns,
            shared=len(ranks[0].keys() & ranks[1].keys()) if len(ranks) == 2 else 0,
            kept=first.values(),
            other=words,
            other_prompt=values.text("other_prompt", LONGEST_QUESTION),
            k=first.k,
            side="opponents" if first.opponents else "proponents",
        )

    def passage(self, values: _Values) -> Any:
        """One row, and what it did for a question if there is one."""
        explorer = self._explorer
        item = explorer.items([values.row("row")])[0]
        asked = self._asked(values) if values.has("q") or values.has("id") else None
        one, notes = None, []
        if asked is not None and explorer.text_model is None:
            notes.append(f"Tokens are not shaded: that takes the model, and {explorer.why}.")
        elif asked is not None:
            try:
                one = explorer.explain(asked.question, [item.id], asked_tokens=True).get(item.id)
            except DataError as error:
                notes.append(f"Tokens are not shaded: {error}.")
        k = PASSAGES if asked is None else asked.k
        can_ask = explorer.text_model is not None and item.text and len(item.text) <= LONGEST_QUESTION
        asked_shaded = None
        if one is not None and one.asked_tokens is not None and one.asked_shares is not None:
            asked_shaded = token_values(one.asked_tokens, one.asked_shares)
        return self._html(
            "passage.html",
            item=item,
            notes=notes,
            question=None if asked is None else asked.question,
            words=None if asked is None else explorer.text_of(asked.question),
            back=None if asked is None else asked.address(asked.here),
            shaded=None if one is None else token_values(one.tokens, one.shares),
            explained=one,
            asked_shaded=asked_shaded,
            layers=[] if one is None else layer_bars(one.layers),
            neighbours=Asked(WrittenQuestion(row=item.id), k).address("/neighbours"),
            asks_text=Asked(WrittenQuestion(item.text), k).address("/search") if can_ask else None,
        )

    # -- for machines ----------------------------------------------------------------------------------------------

    def api_search(self, values: _Values) -> Any:
        """An answer as JSON."""
        asked, side, kept = self._answer(values)
        return {
            "question": asdict(asked.question),
            "opponents": asked.opponents,
            "rerank": asked.rerank,
            "refine": asked.refine,
            "fingerprint": self._explorer.index.fingerprint,
            "field": asked.field,
            "has": asked.has,
            "hits": [{"rank": h.rank, "score": h.score, "lexical": h.lexical, **asdict(h.item)} for h in kept],
            "stats": asdict(side.stats),
        }

    def api_explain(self, values: _Values) -> Any:
        """Shares of tokens and layers of some passages, as JSON."""
        # A row that asks is row=, since id= are the passages.
        found = self._explorer.explain(values.question("row"), values.rows("id", MOST_EXPLAINED))
        return {
            "explained": [
                {"id": row, "score": one.score, "layers": one.layers, "tokens": token_values(one.tokens, one.shares)}
                for row, one in found.items()
            ]
        }

    # -- around them -----------------------------------------------------------------------------------------------

    async def missing(self, request: Any, error: Exception) -> Any:
        """No such page."""
        return self._html("error.html", status=404, message="There is no such page.")

    def endpoint(self, page: Callable[[_Values], Any], *, machine: bool = False) -> Any:
        """A page as Starlette calls it: in a thread, with errors in words.

        Args:
            page: gives a response, or, for a machine, plain values.
            machine: whether JSON is answered.
        """
        from starlette.responses import Response

        def told(status: int, words: str) -> Any:
            if machine:
                return answered({"error": words}, status)
            return self._html("error.html", status=status, message=words)

        def answered(found: Any, status: int = 200) -> Any:
            return Response(plain_json(found), status, media_type="application/json") if machine else found

        # Not a coroutine: Starlette runs it in a thread.
        def answer(request: Any) -> Any:
            try:
                return answered(page(_Values(request.query_params)))
            except Refused as error:
                return told(error.status, str(error))
            except (DataError, ConfigError, NonFiniteError) as error:
                return told(400, str(error))
            except LorifError as error:
                # Its words name files.
                return told(500, f"The index cannot be read ({type(error).__name__}): lorif verify says more.")

        return answer

    def _html(self, template: str, *, status: int = 200, **values: Any) -> Any:
        from starlette.responses import HTMLResponse

        common = {"total": len(self._explorer.index), "name": self._explorer.index.path.name, "version": VERSION}
        common |= {"most_hits": MOST_HITS, "longest_question": LONGEST_QUESTION}
        return HTMLResponse(render(template, **common, **values), status_code=status)

    def _asked(self, values: _Values, k: int = PASSAGES) -> Asked:
        side = values.text("side", 20) or "proponents"
        if side not in ("proponents", "opponents"):
            raise Refused(400, f"side is proponents or opponents, got {side!r}")
        asked, again = values.integers("k", 1, MOST_HITS) or [k], values.integers("rerank", 1, MOST_HITS)
        return Asked(
            values.question("id"),
            asked[0],
            side == "opponents",
            values.text("field", 1000) or SOURCE,
            values.text("has", 1000),
            again[0] if again else None,
            values.integers("refine", 0, 1) == [1],
        )

    def _found(self, asked: Asked) -> Side:
        return self._explorer.search(
            asked.question, asked.k, opponents=asked.opponents, rerank=asked.rerank, refine=asked.refine
        )

    def _answer(self, values: _Values) -> tuple[Asked, Side, list[Found]]:
        """The search, what it found, and what of that the filter leaves."""
        asked = self._asked(values)
        side = self._found(asked)
        return asked, side, [hit for hit in side.hits if asked.keeps(hit.item)]


def _fields(hits: Iterable[Found]) -> list[str]:
    """What passages can be filtered by."""
    payloads = [hit.item.payload for hit in hits if isinstance(hit.item.payload, dict)]
    return list(dict.fromkeys([SOURCE, TEXT, *(key for payload in payloads for key in payload)]))[:_MOST_SOURCES]


class _Values:
    """The values of an address, each checked as it is taken."""

    def __init__(self, params: Any) -> None:
        self._params = params

    def has(self, key: str) -> bool:
        """Whether there is one."""
        return key in self._params

    def text(self, key: str, most: int) -> str:
        """The last value, with newlines as "\\n"; empty where there is none."""
        # Forms send CR LF.
        text = self._params.get(key, "").replace("\r\n", "\n")
        if len(text) > most:
            raise Refused(400, f"{key}= has {len(text):,} characters, where {most:,} are the most")
        return text

    def integers(self, key: str, low: int, high: int) -> list[int]:
        """All of a key's values, each once."""
        texts = self._params.getlist(key)
        for text in texts:
            if not (text.isascii() and text.isdecimal() and len(text) <= 20 and low <= int(text) <= high):
                raise Refused(400, f"{key}= is an integer from {low:,} to {high:,}, got {text!r}")
        return list(dict.fromkeys(map(int, texts)))

    def rows(self, key: str, most: int) -> list[int]:
        """All of a key's rows."""
        found = self.integers(key, 0, _LARGEST_ID)
        if not 1 <= len(found) <= most:
            raise Refused(400, f"{key}= names {len(found)} rows, where 1 to {most} are taken")
        return found

    def row(self, key: str) -> int:
        """A row's id."""
        return self.rows(key, 1)[0]

    def question(self, row_key: str) -> WrittenQuestion:
        """A text, or a row by its key."""
        if not self.has("q") and not self.has(row_key):
            raise Refused(400, f"The address has no question: q= takes a text, {row_key}= a row of the index.")
        if not self.has("q"):
            return WrittenQuestion(row=self.row(row_key))
        return WrittenQuestion(self.text("q", LONGEST_QUESTION), self.text("prompt", LONGEST_QUESTION) or None)
