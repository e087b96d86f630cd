"""Texts of models as HTML that is safe to insert: Markdown, code in colours, LaTeX as MathML; and where two texts differ.

Raw HTML in a text is never markup: it is shown as it was written. What the renderers make passes a list of allowed elements and
attributes once more, so that a fault in one of them cannot reach the page. Pictures that a text names by address are links: a
page that loads them would tell their host who judges what, and when.
"""

import difflib
import functools
import logging
import re
from collections.abc import Sequence
from html import escape, unescape
from html.parser import HTMLParser
from xml.etree.ElementTree import tostring

import nh3
from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 100_000  # a longer text is shown as it was written
MAX_FORMULA = 2_000
MAX_NESTING = 60  # braces in a formula; LaTeX is read recursively
MAX_WORDS, MAX_LINES = 4_000, 10_000  # of both texts together; longer ones are compared by lines, or not at all
MAX_CODE, MAX_LINE = 6_000, 300  # characters of a block, and of a line of it, in colours; some lexers take time as their square

HTML = """a blockquote br code del div em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul"""
MATHML = """math mrow mi mn mo ms mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mmultiscripts
mprescripts none mtable mtr mtd mpadded mphantom mstyle menclose merror semantics"""
ATTRIBUTES: dict[str, set[str]] = {
    "a": {"href", "title"},
    "ol": {"start"},
    "math": {"display"},
    "mi": {"mathvariant"},
    "mo": {"stretchy", "fence", "form", "separator", "movablelimits", "largeop", "minsize", "maxsize", "lspace", "rspace"},
    "mspace": {"width", "height", "depth"},
    "mfrac": {"linethickness"},
    "mtable": {"columnalign", "rowspacing", "columnspacing", "columnlines", "rowlines", "displaystyle"},
    "mtd": {"columnalign"},
    "mstyle": {"displaystyle", "scriptlevel", "mathvariant"},
    "mover": {"accent"},
    "munder": {"accentunder"},
    "menclose": {"notation"},
    "mpadded": {"width", "height", "depth", "lspace", "voffset"},
}
CLEANER = nh3.Cleaner(
    tags={*HTML.split(), *MATHML.split()},
    clean_content_tags={"script", "style"},
    attributes={**ATTRIBUTES, "span": {"class"}, "code": {"class"}, "div": {"class"}, "th": {"class"}, "td": {"class"}},
    url_schemes={"http", "https", "mailto"},
    link_rel="noopener noreferrer nofollow",
    set_tag_attribute_values={"a": {"target": "_blank"}, "pre": {"tabindex": "0"}},
)
Ranges = tuple[tuple[int, int], ...]

FORMULAS = (("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False), ("$", "$", False))


@functools.lru_cache(maxsize=512)
def html_of(text: str) -> str | None:
    r"""A text as sanitised HTML: CommonMark with tables and strikethrough, code, and LaTeX in $..$, \(..\), $$..$$ and \[..\].

    Returns None for a text of more than `MAX_CHARACTERS`, which is to be shown as it was written. A formula that cannot be read
    stays in LaTeX.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    return CLEANER.clean(_markdown().render(text))


class _Words(HTMLParser):
    """Gathers the text of HTML as a browser has it; what stands in a formula counts as well."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []

    def handle_data(self, data: str) -> None:
        self.found.append(data)


@functools.lru_cache(maxsize=512)
def text_of(html: str) -> str:
    """The text of what `html_of` made: the `textContent` that a browser has of it."""
    reader = _Words()
    reader.feed(html)
    reader.close()
    return "".join(reader.found)


def mathml(formula: str, *, block: bool) -> str:
    """A LaTeX formula as MathML; as code where it cannot be read, or is too long or too deep to try."""
    source = f'<code class="formula">{escape(formula)}</code>'
    if len(formula) > MAX_FORMULA or formula.count("{") + formula.count(r"\left") > MAX_NESTING:
        return source
    try:
        root = convert_to_element(formula.replace("{aligned}", "{split}"), display="block" if block else "inline")
    except Exception as fault:  # its parser raises classes without a common base, and plain IndexError, on what models write
        logger.debug("a formula stays in LaTeX: %r", fault)
        return source
    for node in root.iter():  # characters come as entities, and words of the formula as they are: neither may become markup
        node.text = unescape(node.text) if node.text else node.text
    return tostring(root, encoding="unicode")


@functools.lru_cache(maxsize=256)
def changes(left: str, right: str) -> tuple[Ranges, Ranges]:
    """Where two texts differ: ranges [start, end) of characters of each, in order and apart; word by word.

    Spaces do not count. Texts of more than `MAX_WORDS` words together are compared line by line, those of more than `MAX_LINES`
    lines not at all.
    """
    pattern = r"\w+|[^\w\s]"
    words = [list(re.finditer(pattern, text)) for text in (left, right)]
    if sum(map(len, words)) > MAX_WORDS:
        words = [list(re.finditer(r"\S[^\n]*", text)) for text in (left, right)]
        if sum(map(len, words)) > MAX_LINES:
            return (), ()
    said = [[word.group().rstrip() for word in side] for side in words]
    matcher = difflib.SequenceMatcher(None, said[0], said[1])
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for kind, *places in matcher.get_opcodes():
        if kind != "equal":
            for side, spans, (start, end) in zip(words, found, (places[:2], places[2:]), strict=True):
                spans += _span(side, start, end)
    return tuple(found[0]), tuple(found[1])


def _span(words: Sequence[re.Match[str]], start: int, end: int) -> list[tuple[int, int]]:
    return [(words[start].start(), words[end - 1].end())] if end > start else []


@functools.cache
def _markdown() -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False, "highlight": _coloured}).enable(["table", "strikethrough"])
    reader.inline.ruler.before("escape", "formula", _inline_formula)
    reader.block.ruler.before(
        "fence", "formula_block", _block_formula, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    reader.add_render_rule("formula", _render_formula)
    reader.add_render_rule("image", _render_image)
    return reader


def _coloured(code: str, language: str, _attributes: str) -> str:
    """Colours for a fenced block whose language is named; an empty answer leaves it plain."""
    short = len(code) <= MAX_CODE and max(map(len, code.splitlines()), default=0) <= MAX_LINE
    try:
        lexer = get_lexer_by_name(language) if language and short else None
    except ClassNotFound:
        return ""
    return highlight(code, lexer, HtmlFormatter(nowrap=True)) if lexer else ""


def _inline_formula(state: StateInline, silent: bool) -> bool:
    """Read a formula within a line. As in Pandoc: no space inside a single $, and no digit after the closing one (prices)."""
    for opening, closing, block in FORMULAS:
        if not state.src.startswith(opening, state.pos):
            continue
        start = state.pos + len(opening)
        end = state.src.find(closing, start, state.posMax)
        while opening == "$" and end > 0 and state.src[end - 1] == "\\":
            end = state.src.find(closing, end + 1, state.posMax)
        if end <= start or not state.src[start:end].strip() or (opening == "$" and not _closes(state.src, start, end)):
            return False
        if not silent:
            token = state.push("formula", "", 0)
            token.content, token.block = state.src[start:end].strip(), block
        state.pos = end + len(closing)
        return True
    return False


def _closes(text: str, start: int, end: int) -> bool:
    return not text[start].isspace() and not text[end - 1].isspace() and not text[end + 1 : end + 2].isdigit()


def _block_formula(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """Read a formula that begins a line with $$ or \\[ and ends a line, so that no line of it is taken for a list or a rule."""
    first = state.bMarks[start_line] + state.tShift[start_line]
    marks = next(((o, c) for o, c, block in FORMULAS if block and state.src.startswith(o, first)), None)
    if marks is None or state.is_code_block(start_line):
        return False
    opening, closing = marks
    for line in range(start_line, end_line):
        begin = first + len(opening) if line == start_line else state.bMarks[line]
        text = state.src[begin : state.eMarks[line]].rstrip()
        if line > start_line and (not text or state.sCount[line] < state.blkIndent):
            return False
        if text.endswith(closing):
            if not silent:
                whole = state.src[first + len(opening) : begin + len(text) - len(closing)]
                token = state.push("formula", "", 0)
                token.content, token.block, token.map = whole.strip(), True, [start_line, line + 1]
                state.line = line + 1
            return True
        if closing in text:
            return False
    return False


def _render_formula(_self: RendererHTML, tokens: Sequence[Token], index: int, _options: OptionsDict, _env: EnvType) -> str:
    token = tokens[index]
    html = mathml(token.content, block=token.block)
    return f'<div class="formula">{html}</div>\n' if token.map else html


def _render_image(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    """Link to a picture that the text names, in place of loading it."""
    token = tokens[index]
    words = renderer.renderInlineAsText(token.children or [], options, env) or "picture"
    return f'<a href="{escape(str(token.attrs.get("src", "")))}">{escape(words)}</a>'
