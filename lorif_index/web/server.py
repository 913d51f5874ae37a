"""Server: the explorer's pages and JSON, on Starlette. Pages are rendered here; the script only shades tokens.

No address names a file: the stylesheet, script and icon are three fixed names, read from the package at the start.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np

from ..errors import ConfigError, DataError, LorifError, NonFiniteError
from ..version import VERSION
from .charts import by_source, family, histogram, layer_bars
from .explorer import MOST_EXPLAINED, MOST_HITS, Explorer, Found, Question, Shading, Side
from .export import answer_csv, answer_json
from .guard import Guard, allowed_hosts
from .page import asset, plain_json, render, shaded, token_values

PER_PAGE = (10, 20, 50, 100, 200, 500, 1000)
LONGEST_QUESTION = 20_000
"""Characters of a question, and of a prompt."""
_FILES = {
    "style.css": "text/css; charset=utf-8",
    "explorer.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
# Requests that may wait for the model; the next ones are told to come again.
_MOST_WAITING = 16
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

    question: Question
    k: int
    recall: float = 0.99
    exact: bool = False
    opponents: bool = False
    source: str = ""
    page: int = 1
    per: int = PER_PAGE[1]

    @property
    def here(self) -> str:
        """The page that answers it."""
        return "/search" if self.question.row is None else "/neighbours"

    def address(self, path: str, **changes: Any) -> str:
        """The address of this search with some changes; what is at its default is left out."""
        values: dict[str, Any] = {
            "q": self.question.text,
            "prompt": self.question.prompt,
            "id": self.question.row,
            "k": self.k,
            "recall": self.recall if self.recall != 0.99 else None,
            "exact": "1" if self.exact else None,
            "side": "opponents" if self.opponents else None,
            "source": self.source or None,
            "per": self.per if self.per != PER_PAGE[1] else None,
            "page": self.page if self.page > 1 else None,
        } | changes
        # Lone surrogates cannot come in an address, nor go out in one.
        return f"{path}?{urlencode({k: v for k, v in values.items() if v is not None}, errors='replace')}"


def make_app(
    explorer: Explorer,
    *,
    host: str = "127.0.0.1",
    names: Iterable[str] = (),
    k: int = 50,
    shade: int = 10,
) -> Guard:
    """The explorer as an ASGI app, guarded.

    Args:
        explorer: the index.
        host: what the server is bound to.
        names: further names that it goes by.
        k: passages that a search finds where its address does not say.
        shade: passages of a page whose tokens are shaded by themselves.

    Raises:
        ConfigError: Starlette or Jinja2 is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.routing import Route
    except ImportError:
        raise ConfigError(
            "serving needs Starlette, which is not installed: install the extra serve of lorif-index"
        ) from None
    pages = _Pages(explorer, k, shade)
    routes = [
        Route("/", pages.endpoint(pages.home)),
        Route("/search", pages.endpoint(pages.search)),
        Route("/neighbours", pages.endpoint(pages.search)),
        Route("/passage", pages.endpoint(pages.passage)),
        Route("/api/search", pages.endpoint(pages.api_search, machine=True)),
        Route("/api/explain", pages.endpoint(pages.api_explain, machine=True)),
        Route("/export.json", pages.endpoint(pages.export_json, machine=True)),
        Route("/export.csv", pages.endpoint(pages.export_csv, machine=True)),
        *(Route(f"/static/{name}", pages.static(name, kind)) for name, kind in _FILES.items()),
    ]
    app = Starlette(routes=routes, exception_handlers={404: pages.missing})
    everywhere = host in ("0.0.0.0", "::")
    return Guard(app, allowed_hosts(host, names), any_address=everywhere)


def serve(app: Guard, *, host: str, port: int, started: Callable[[str], None]) -> None:
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
            "serving needs uvicorn, which is not installed: install the extra serve of lorif-index"
        ) from None
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(128)
        shown = f"[{host}]" if ":" in host else host
        started(f"http://{shown}:{bound.getsockname()[1]}/")
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            date_header=False,
            proxy_headers=False,
            limit_concurrency=64,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=65536,
            http="h11",
            ws="none",
            lifespan="off",
        )
        uvicorn.Server(config).run(sockets=[bound])


class _Pages:
    """What each address answers."""

    def __init__(self, explorer: Explorer, k: int, shade: int) -> None:
        self._explorer, self._k, self._shade = explorer, min(k, MOST_HITS), min(shade, MOST_HITS)
        self._waiting = threading.BoundedSemaphore(_MOST_WAITING)

    # -- pages -----------------------------------------------------------------------------------------------------

    def home(self, values: _Values) -> Any:
        """The first page."""
        examples = []
        for label, question in self._explorer.examples():
            asked = Asked(question, self._k)
            examples.append((label, asked.address(asked.here)))
        return self._html(
            "home.html",
            asks=self._explorer.explains,
            examples=examples,
            default_k=self._k,
            notes=[] if self._explorer.explains else [f"Texts cannot be asked about: {self._explorer.why}."],
        )

    def search(self, values: _Values) -> Any:
        """One page of an answer, for a text or for a row."""
        asked, side, kept = self._answer(values)
        question, explorer = asked.question, self._explorer
        here, pages = asked.here, max(-(-len(kept) // asked.per), 1)
        page = min(asked.page, pages)
        begin = (page - 1) * asked.per
        rows = [
            {
                "hit": hit,
                "place": f"{place:,}",
                "passage": asked.address("/passage", row=hit.item.id, page=page if page > 1 else None),
                "neighbours": _neighbours(hit.item.id, asked.k),
            }
            for place, hit in enumerate(kept[begin : begin + asked.per], start=begin + 1)
        ]
        scores = explorer.scores(question)
        found = np.array([hit.score for hit in kept])
        hidden: dict[str, Any] = {"q": question.text, "prompt": question.prompt, "id": question.row, "k": asked.k}
        hidden |= {"recall": asked.recall, "exact": "1" if asked.exact else None}
        hidden |= {"side": "opponents" if asked.opponents else None}
        return self._html(
            "results.html",
            question=question,
            words=explorer.text_of(question),
            loss=explorer.loss(question),
            notes=[],
            k=asked.k,
            recall=asked.recall,
            exact=asked.exact,
            explains=explorer.explains,
            explain_address=asked.address(
                "/api/explain",
                id=None,
                row=question.row,
                k=None,
                side=None,
                source=None,
                per=None,
                page=None,
                recall=None,
                exact=None,
            ),
            first_shaded=self._shade,
            side="opponents" if asked.opponents else "proponents",
            side_addresses=[asked.address(here, side=side, page=None) for side in (None, "opponents")],
            here=here,
            kept=[(key, value) for key, value in hidden.items() if value is not None],
            source=asked.source,
            sources=sorted({family(h.item.source) for h in side.hits if h.item.source})[:_MOST_SOURCES],
            pages_of=PER_PAGE,
            per=asked.per,
            page=page,
            pages=pages,
            previous=asked.address(here, page=page - 1) if page > 1 else None,
            next=asked.address(here, page=page + 1) if page < pages else None,
            found=len(side.hits),
            matching=len(kept),
            hits=rows,
            largest=max((abs(hit.score) for hit in side.hits), default=0.0) or 1.0,
            exports=[asked.address(f"/export.{kind}", page=None, per=None) for kind in ("json", "csv")],
            source_bars=by_source((hit.item.source, hit.score) for hit in kept),
            columns=[] if scores is None else histogram(scores, found),
            stats=side.stats,
        )

    def passage(self, values: _Values) -> Any:
        """One row, and what it did for a question if there is one."""
        row = values.row("row")
        if row is None:
            raise Refused(400, "Which passage? The address has no row=.")
        item = self._explorer.items([row])[0]
        asked = self._asked(values) if values.has("q") or values.has("id") else None
        explained = None
        notes = []
        if asked is not None and self._explorer.explains:
            explained, why = self._explained(asked.question, row)
            notes += [f"Tokens are not shaded: {why}."] if why else []
        elif asked is not None:
            notes.append(f"Tokens are not shaded: that takes the model, and {self._explorer.why}.")
        k = self._k if asked is None else asked.k
        asks_text = None
        if self._explorer.explains and item.text and len(item.text) <= LONGEST_QUESTION:
            asks_text = Asked(Question(item.text), k).address("/search")
        return self._html(
            "passage.html",
            item=item,
            notes=notes,
            question=None if asked is None else asked.question,
            words=None if asked is None else self._explorer.text_of(asked.question),
            back=None if asked is None else asked.address(asked.here),
            shaded=None if explained is None else shaded(explained),
            explained=explained,
            stored=None if asked is None else self._stored(asked.question, row),
            asked_shaded=None
            if explained is None or explained.asked_tokens is None or explained.asked_shares is None
            else token_values(explained.asked_tokens, explained.asked_shares),
            layers=[] if explained is None else layer_bars(explained.layers, most=40),
            neighbours=_neighbours(row, k),
            asks_text=asks_text,
        )

    def _explained(self, question: Question, row: int) -> tuple[Shading | None, str]:
        """How a passage's score comes about, or why that cannot be said; the page is there without it."""
        try:
            return self._explorer.explain(question, [row], asked_tokens=True).get(row), ""
        except DataError as error:
            return None, str(error)

    def _stored(self, question: Question, row: int) -> float | None:
        """The score that a search gives the row, where all scores are known."""
        scores = self._explorer.scores(question)
        return None if scores is None else float(scores[np.searchsorted(self._explorer.index.ids, row)])

    # -- for machines ----------------------------------------------------------------------------------------------

    def api_search(self, values: _Values) -> Any:
        """One page of an answer as JSON."""
        asked, side, kept = self._answer(values)
        begin = (asked.page - 1) * asked.per
        hits, more = kept[begin : begin + asked.per], {"found": len(kept), "page": asked.page, "per": asked.per}
        return self._json(self._answer_json(asked, side, hits, **more))

    def api_explain(self, values: _Values) -> Any:
        """Shares of tokens and layers of some passages, as JSON."""
        # A row that asks is row=, since id= are the passages.
        question = self._question(values, "row")
        ids = values.rows("id", MOST_EXPLAINED)
        found = self._explorer.explain(question, ids)
        explained = [
            {"id": row, "score": one.score, "layers": one.layers, "tokens": shaded(one)} for row, one in found.items()
        ]
        return self._json(plain_json({"explained": explained}))

    def export_json(self, values: _Values) -> Any:
        """The whole answer, as JSON to keep."""
        asked, side, kept = self._answer(values)
        return self._json(self._answer_json(asked, side, kept, source=asked.source), name="answer.json")

    def _answer_json(self, asked: Asked, side: Side, hits: list[Found], **more: Any) -> str:
        facts = {"opponents": asked.opponents, "fingerprint": self._explorer.index.fingerprint}
        return answer_json(asked.question, hits, side.stats, **facts, **more)

    def export_csv(self, values: _Values) -> Any:
        """The whole answer, as CSV to keep."""
        from starlette.responses import Response

        _, _, kept = self._answer(values)
        disposition = {"content-disposition": 'attachment; filename="answer.csv"'}
        return Response(answer_csv(kept), media_type="text/csv; charset=utf-8", headers=disposition)

    # -- around them -----------------------------------------------------------------------------------------------

    def static(self, name: str, kind: str) -> Any:
        """One of the package's own files, read now."""
        from starlette.responses import Response

        text = asset(f"static/{name}")

        async def answer(request: Any) -> Any:
            return Response(text, media_type=kind)

        return answer

    async def missing(self, request: Any, error: Exception) -> Any:
        """No such page."""
        return self._html("error.html", status=404, message="There is no such page.")

    def endpoint(self, page: Callable[[_Values], Any], *, machine: bool = False) -> Any:
        """A page as Starlette calls it: in a thread, a few waiting at most, errors in words."""
        from starlette.concurrency import run_in_threadpool

        def answer(pairs: list[tuple[str, str]]) -> Any:
            try:
                return page(_Values(pairs))
            except Refused as error:
                return self._error(error.status, str(error), machine)
            except (DataError, ConfigError, NonFiniteError) as error:
                return self._error(400, str(error), machine)
            except LorifError as error:
                # Its words name files.
                kind = type(error).__name__
                return self._error(500, f"The index cannot be read ({kind}): lorif verify says more.", machine)

        async def called(request: Any) -> Any:
            if not self._waiting.acquire(blocking=False):
                return self._error(503, "Too many questions at once: ask again in a moment.", machine)
            try:
                return await run_in_threadpool(answer, request.query_params.multi_items())
            finally:
                self._waiting.release()

        return called

    def _error(self, status: int, words: str, machine: bool) -> Any:
        if machine:
            return self._json(plain_json({"error": words}), status=status)
        return self._html("error.html", status=status, message=words)

    def _html(self, template: str, *, status: int = 200, **values: Any) -> Any:
        from starlette.responses import HTMLResponse

        common = {"total": len(self._explorer.index), "name": self._explorer.index.path.name, "version": VERSION}
        common |= {"most_hits": MOST_HITS, "longest_question": LONGEST_QUESTION}
        return HTMLResponse(render(template, **common, **values), status_code=status)

    def _json(self, text: str, *, status: int = 200, name: str | None = None) -> Any:
        from starlette.responses import Response

        headers = {} if name is None else {"content-disposition": f'attachment; filename="{name}"'}
        return Response(text, status_code=status, media_type="application/json", headers=headers)

    # -- questions -------------------------------------------------------------------------------------------------

    def _question(self, values: _Values, row_key: str = "id") -> Question:
        if values.has("q"):
            text = values.text("q", LONGEST_QUESTION)
            return Question(text, values.text("prompt", LONGEST_QUESTION) or None)
        row = values.row(row_key)
        if row is None:
            raise Refused(400, f"The address has no question: q= takes a text, {row_key}= a row of the index.")
        return Question(row=row)

    def _asked(self, values: _Values) -> Asked:
        side = values.text("side", 20) or "proponents"
        if side not in ("proponents", "opponents"):
            raise Refused(400, f"side is proponents or opponents, got {side!r}")
        return Asked(
            question=self._question(values),
            k=values.integer("k", self._k, MOST_HITS),
            recall=values.share("recall", 0.99),
            exact=values.text("exact", 5) == "1",
            opponents=side == "opponents",
            source=values.text("source", 1000),
            page=values.integer("page", 1, MOST_HITS),
            per=values.integer("per", PER_PAGE[1], MOST_HITS),
        )

    def _answer(self, values: _Values) -> tuple[Asked, Side, list[Found]]:
        """The search, what it found, and what of that the filter leaves."""
        asked = self._asked(values)
        side = self._explorer.search(
            asked.question, asked.k, opponents=asked.opponents, recall=asked.recall, exact=asked.exact
        )
        wanted = asked.source.casefold()
        kept = [hit for hit in side.hits if not wanted or wanted in (hit.item.source or "").casefold()]
        return asked, side, kept


def _neighbours(row: int, k: int) -> str:
    return Asked(Question(row=row), k).address("/neighbours")


class _Values:
    """The values of an address, each checked as it is taken."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._values: dict[str, list[str]] = {}
        for key, value in pairs:
            self._values.setdefault(key, []).append(value)

    def has(self, key: str) -> bool:
        """Whether there is one."""
        return key in self._values

    def text(self, key: str, most: int) -> str:
        """The value, with newlines as "\\n"; empty where there is none."""
        values = self._values.get(key, [""])
        if len(values) > 1:
            raise Refused(400, f"{key}= is given {len(values)} times: give it once")
        # Forms send CR LF.
        text = values[0].replace("\r\n", "\n")
        if len(text) > most:
            raise Refused(400, f"{key}= has {len(text):,} characters, where {most:,} are the most")
        return text

    def integer(self, key: str, default: int, most: int) -> int:
        """An integer in 1 .. most."""
        text = self.text(key, 30).strip()
        return default if not text else _integer(key, text, 1, most)

    def row(self, key: str) -> int | None:
        """A row's id, if there is one."""
        text = self.text(key, 30).strip()
        return None if not text else _integer(key, text, 0, _LARGEST_ID)

    def rows(self, key: str, most: int) -> list[int]:
        """All of a key's rows, each once."""
        values = self._values.get(key, [])
        if not 1 <= len(values) <= most:
            raise Refused(400, f"{key}= is given {len(values)} times, where 1 to {most} are taken")
        return list(dict.fromkeys(_integer(key, value, 0, _LARGEST_ID) for value in values))

    def share(self, key: str, default: float) -> float:
        """A number above 0 and at most 1."""
        text = self.text(key, 30).strip()
        try:
            value = float(text) if text else default
        except ValueError:
            value = -1.0
        if not 0 < value <= 1:
            raise Refused(400, f"{key}= is above 0 and at most 1, got {text!r}")
        return value


def _integer(key: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and low <= int(text) <= high):
        raise Refused(400, f"{key}= is an integer from {low:,} to {high:,}, got {text!r}")
    return int(text)
