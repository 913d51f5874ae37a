// Shades tokens once the page is there, and opens long passages. Everything from the index goes in as text nodes.
"use strict";

(() => {
  const list = document.querySelector("[data-explain]");
  const AT_ONCE = 5;

  // -- long passages

  // Measured as they come into sight: what is out of sight has no layout yet, and a thousand would take seconds.
  const seen = new IntersectionObserver((entries) => {
    const near = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target);
    const fits = near.map((text) => text.scrollHeight <= text.clientHeight + 4);
    near.forEach((text, at) => {
      seen.unobserve(text);
      const more = text.parentElement.querySelector("[data-more]");
      text.classList.toggle("fits", fits[at]);
      if (fits[at] || !more) return;
      more.hidden = false;
      more.addEventListener("click", () => {
        const open = text.classList.toggle("open");
        more.setAttribute("aria-expanded", String(open));
        more.textContent = open ? "Show less" : "Show all";
      });
    });
  }, { rootMargin: "300px" });
  for (const text of document.querySelectorAll(".list .text")) seen.observe(text);

  // -- shading

  const span = (kind, words, title) => {
    const made = document.createElement("span");
    made.className = kind;
    if (title) made.title = title;
    made.append(words);
    return made;
  };

  const paint = (place, tokens) => {
    const parts = tokens.map((token) => {
      const made = document.createElement("span");
      made.className = token.level ? "t " + token.level : "t";
      made.title = token.title;
      for (const [words, name] of token.pieces) made.append(name ? span("mark", words, name) : words);
      return made;
    });
    place.replaceChildren(...parts);
    place.dataset.shaded = "yes";
  };

  const shade = async (ids) => {
    const address = new URL(list.dataset.explain, document.baseURI);
    for (const id of ids) address.searchParams.append("id", id);
    const answer = await fetch(address, { credentials: "omit" });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    for (const one of found.explained) {
      const place = list.querySelector(`.text[data-id="${Number(one.id)}"]`);
      if (place) paint(place, one.tokens);
    }
  };

  const status = document.querySelector("[data-status]");
  const say = (words) => { if (status) status.textContent = words; };

  const shadeAll = async () => {
    const ids = [...list.querySelectorAll(".text[data-id]")].map((place) => place.dataset.id);
    const first = ids.slice(0, Number(list.dataset.first));
    say("Shading tokens…");
    try {
      for (let at = 0; at < first.length; at += AT_ONCE) await shade(first.slice(at, at + AT_ONCE));
      say("");
    } catch (error) {
      say("Tokens could not be shaded: " + error.message);
    }
    for (const button of list.querySelectorAll("[data-shade]")) {
      if (first.includes(button.dataset.shade)) continue;
      button.hidden = false;
      button.addEventListener("click", async () => {
        button.disabled = true;
        try {
          await shade([button.dataset.shade]);
          button.hidden = true;
        } catch (error) {
          button.disabled = false;
          say("Tokens could not be shaded: " + error.message);
        }
      });
    }
  };

  if (list) shadeAll();

  // -- the form: Ctrl+Enter asks

  const words = document.querySelector("textarea[name=q]");
  if (words) {
    words.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) words.form.requestSubmit();
    });
  }
})();
