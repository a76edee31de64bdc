"use strict";
// The page is complete without this script, which only hides answers that were not asked for.
{
  const [bar, words, source, change, count] = ["bar", "words", "source", "change", "count"].map(
    (name) => document.getElementById(`filter-${name}`));
  const groups = [...document.querySelectorAll("details.group")].map((group) => ({
    group,
    articles: [...group.querySelectorAll("article")].map(
      (article) => ({ article, text: article.textContent.toLowerCase() })),
  }));
  const update = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter((word) => word !== "");
    let shown = 0, total = 0;
    for (const { group, articles } of groups) {
      let here = 0;
      for (const { article, text } of articles) {
        const fits = (source.value === "" || article.dataset.source === source.value)
          && (change.value === "" || group.dataset.change === change.value)
          && wanted.every((word) => text.includes(word));
        article.hidden = !fits;
        here += fits ? 1 : 0;
      }
      group.hidden = here === 0;
      shown += here;
      total += articles.length;
    }
    count.textContent = `${shown} of ${total} shown`;
  };
  for (const control of [words, source, change]) control.addEventListener("input", update);
  bar.hidden = false;
  update();
}
