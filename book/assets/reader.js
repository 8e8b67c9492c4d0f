// What every page does for its reader, beyond what the theme does.

// What the search looks for (search.js): a run of Chinese characters as it stands, a letter as a word, the stem of an
// English word at the beginning of words.
function patternOf(stem) {
  if (/\p{Script=Han}/u.test(stem)) return stem;
  return `(?<![\\p{L}\\p{N}])${stem}${stem.length > 1 ? "[\\p{Script=Latin}]*" : "(?![\\p{L}\\p{N}])"}`;
}

addEventListener("DOMContentLoaded", () => {
  const article = document.querySelector(".bd-article");
  if (!article) return;
  const chinese = document.documentElement.lang.startsWith("zh");

  // Words that the search found (search.js) are marked, without a change to the page; formulas stay.
  const found = new URLSearchParams(location.search).get("found")?.match(/[\p{L}\p{N}_]+/gu);
  if (found && CSS.highlights) {
    const words = new RegExp(found.map(patternOf).join("|"), "giu");
    const ranges = [];
    const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT, (text) =>
      text.parentElement.closest(".math, script, style") ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT,
    );
    while (texts.nextNode()) {
      for (const { index, 0: word } of texts.currentNode.textContent.matchAll(words)) {
        const range = new Range();
        range.setStart(texts.currentNode, index);
        range.setEnd(texts.currentNode, index + word.length);
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  // The other language opens at the section that is being read: sections have the same ids in both.
  const other = document.querySelector(".language-switch");
  other?.addEventListener("click", () => {
    const passed = [...article.querySelectorAll("section[id]")].filter((part) => part.getBoundingClientRect().top < 150);
    const here = scrollY > 150 && passed.length > 1 ? `#${passed.at(-1).id}` : "";
    other.href = other.href.replace(/#.*$/, "") + here;
  });

  // Paper is white, and what is folded cannot be opened on it; solutions stay shut.
  const root = document.documentElement;
  let theme, opened;
  addEventListener("beforeprint", () => {
    theme = root.dataset.theme;
    root.dataset.theme = "light";
    opened = [...article.querySelectorAll("details:not([open], .solution)")];
    opened.forEach((fold) => (fold.open = true));
  });
  addEventListener("afterprint", () => {
    root.dataset.theme = theme;
    opened.forEach((fold) => (fold.open = false));
  });

  let moved = false;
  for (const kind of ["wheel", "touchmove", "keydown", "mousedown"]) addEventListener(kind, () => (moved = true), { passive: true });

  // A box can be reached by keyboard only while there is something in it to scroll.
  const boxes = article.querySelectorAll("pre, div.math, .pst-scrollable-table-container, .output.text_html");
  function nameBoxes() {
    for (const box of boxes) {
      const overflows = box.scrollWidth > box.clientWidth + 1;
      const name = chinese ? "可横向滚动" : "scrolls sideways";
      for (const [attribute, value] of [["tabindex", "0"], ["role", "group"], ["aria-label", name]]) {
        if (overflows) box.setAttribute(attribute, value);
        else box.removeAttribute(attribute);
      }
    }
  }
  addEventListener("resize", nameBoxes);
  article.addEventListener("toggle", nameBoxes, true); // a fold was opened
  addEventListener("load", () => {
    nameBoxes();
    window.MathJax?.startup?.promise.then(() => {
      nameBoxes();
      // Formulas have moved what the address names, unless the reader has moved on meanwhile.
      if (!moved && location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
    });

    // One stop for all copy buttons; the arrow keys go from one that is not folded away to the next.
    const shown = () => [...article.querySelectorAll("button.copybtn")].filter((button) => button.checkVisibility());
    article.querySelectorAll("button.copybtn").forEach((button) => {
      button.tabIndex = -1;
      button.addEventListener("keydown", ({ key }) => {
        const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[key];
        const next = step && shown()[shown().indexOf(button) + step];
        if (!next) return;
        button.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    });
    if (shown().length) shown()[0].tabIndex = 0;
    // With the links to headings, equations and terms, a page would have a hundred stops; its contents, search and glossary
    // lead to the same places.
    article.querySelectorAll("a:is(.headerlink, .equation, .term)").forEach((link) => (link.tabIndex = -1));
  });
});
