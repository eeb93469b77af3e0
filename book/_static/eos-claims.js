// The claims page: show the claims of a paper, with a verdict, or that contain a word. The address keeps the choice, so
// that ?verdict=counterexample can be linked to. Without JavaScript all claims are shown.
(() => {
  "use strict";
  const cards = [...document.querySelectorAll(".eos-claim[id]")];
  if (!cards.length) return;
  const has = (card, prefix) => [...card.classList].find((c) => c.startsWith(prefix))?.slice(prefix.length) ?? "";
  const choices = (prefix) => [...new Set(cards.map((card) => has(card, prefix)))].sort();
  const fields = {
    paper: ["eos-of-", "Paper", (v) => v.toUpperCase()],
    verdict: ["eos-is-", "Verdict as printed", (v) => v.replaceAll("-", " ")],
    kind: ["eos-kind-", "Kind", (v) => v],
  };
  const form = document.createElement("form");
  form.className = "eos-filter";
  form.setAttribute("role", "search");
  form.setAttribute("aria-label", "Filter the claims");
  const given = new URLSearchParams(location.search);
  const inputs = {};
  for (const [name, [prefix, title, word]] of Object.entries(fields)) {
    const select = document.createElement("select");
    select.append(new Option("all", ""), ...choices(prefix).map((v) => new Option(word(v), v)));
    select.value = given.get(name) ?? "";
    if (select.selectedIndex < 0) select.value = "";
    inputs[name] = select;
    form.append(labelled(title, select));
  }
  const words = document.createElement("input");
  words.type = "search";
  words.placeholder = "such as Lemma 3.2";
  words.value = given.get("text") ?? "";
  inputs.text = words;
  form.append(labelled("Text", words));
  const shown = document.createElement("p");
  shown.className = "eos-filter-count";
  shown.setAttribute("role", "status");
  form.append(shown);

  function labelled(title, input) {
    const label = document.createElement("label");
    label.append(title, input);
    return label;
  }

  function apply() {
    const text = words.value.trim().toLowerCase();
    let count = 0;
    for (const card of cards) {
      const fits =
        Object.entries(fields).every(([name, [prefix]]) => !inputs[name].value || has(card, prefix) === inputs[name].value) &&
        (!text || card.textContent.toLowerCase().includes(text));
      card.hidden = !fits;
      count += fits;
    }
    // A heading without a claim below it would be left over.
    for (const head of document.querySelectorAll(".eos-item")) {
      let next = head.nextElementSibling;
      let empty = true;
      for (; next && next.classList.contains("eos-claim"); next = next.nextElementSibling) empty &&= next.hidden;
      head.hidden = empty;
    }
    shown.textContent = `${count} of ${cards.length} claims shown`;
    const kept = new URLSearchParams();
    for (const [name, input] of Object.entries(inputs)) if (input.value) kept.set(name, input.value);
    const query = kept.toString();
    try {
      history.replaceState(null, "", (query ? `?${query}` : location.pathname.split("/").pop()) + location.hash);
    } catch {
      // A page opened from a disk may not be allowed to change its address.
    }
  }

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  const first = document.querySelector(".bd-article section section, .eos-counts");
  first.parentNode.insertBefore(form, first);
  apply();
  if (location.hash) {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    // A link to one claim wins over the filter.
    if (target?.hidden) {
      for (const input of Object.values(inputs)) input.value = "";
      apply();
      target.scrollIntoView();
    }
  }
})();
