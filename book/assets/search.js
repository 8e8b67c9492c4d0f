// The search page: looks through PAGES, [name, title, [[id, title, text] of each section]] of every page (book/ext/search.py).
// Search, _finishSearch and Stemmer are Sphinx's; it calls Search.query once its own index, which holds no words, is there.
{
  const MOST = 30; // sections shown
  const AROUND = 90; // characters before and after the first word found

  // The stemmer keeps the ending -age, but leakage is to find leaks.
  function stemOf(word) {
    if (/\p{Script=Han}/u.test(word)) return word;
    return new Stemmer().stemWord(word).replace(/(?<=.{4})ag$/, "").replace(/(?<=.{3})[iye]$/, "");
  }

  const stemsOf = (query) => (query.toLowerCase().match(/\p{Script=Han}+|[\p{Script=Latin}\p{N}_]+/gu) ?? []).map(stemOf);
  const count = (text, pattern) => text.match(new RegExp(pattern, "giu"))?.length ?? 0;

  // The sections of a page, best first, that hold every word, or failing that, if the page as a whole does, its best one.
  function ofPage([page, pageTitle, sections], patterns) {
    const rated = sections.map(([id, title, text]) => {
      const counts = patterns.map((pattern) => 10 * count(title, pattern) + Math.min(count(text, pattern), 9));
      const held = counts.filter((found) => found > 0).length;
      return { page, pageTitle, id, title, text, counts, held, score: 100 * held + counts.reduce((a, b) => a + b, 0) };
    });
    rated.sort((a, b) => b.score - a.score);
    const whole = rated.filter(({ held }) => held === patterns.length);
    const everywhere = patterns.every((_, i) => rated.some(({ counts }) => counts[i] > 0));
    return whole.length ? whole : everywhere ? rated.slice(0, 1) : [];
  }

  function find(stems) {
    const patterns = stems.map(patternOf);
    const found = patterns.length ? PAGES.flatMap((page) => ofPage(page, patterns)) : [];
    return found.sort((a, b) => b.score - a.score).slice(0, MOST);
  }

  // Several Chinese words in a row, perhaps: their pairs of characters, as far as the book has them.
  function pairsOf(stem) {
    if (!/\p{Script=Han}{3}/u.test(stem)) return [stem];
    const pairs = Array.from({ length: stem.length - 1 }, (_, i) => stem.slice(i, i + 2));
    return pairs.filter((pair) => PAGES.some(([, , sections]) => sections.some(([, , text]) => text.includes(pair))));
  }

  function snippet(text, stems) {
    const all = new RegExp(stems.map(patternOf).join("|"), "giu");
    const start = Math.max(text.search(all) - AROUND, 0);
    const shown = (start ? "…" : "") + text.slice(start, start + 2 * AROUND) + (start + 2 * AROUND < text.length ? "…" : "");
    const line = document.createElement("p");
    line.className = "context";
    let at = 0;
    for (const match of shown.matchAll(all)) {
      const mark = document.createElement("mark");
      mark.textContent = match[0];
      line.append(shown.slice(at, match.index), mark);
      at = match.index + match[0].length;
    }
    line.append(shown.slice(at));
    return line;
  }

  Search.query = (query) => {
    let stems = stemsOf(query);
    let found = find(stems);
    if (!found.length) {
      stems = stems.flatMap(pairsOf);
      found = find(stems);
    }
    for (const { page, pageTitle, id, title, text } of found) {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = `${page}.html?found=${encodeURIComponent(stems.join(" "))}#${id}`;
      link.textContent = title === pageTitle ? title : `${pageTitle} › ${title}`;
      item.append(link, snippet(text, stems));
      Search.output.append(item);
    }
    _finishSearch(found.length);
  };
}
