"use strict";
(() => {
  const rows = () => [...document.querySelectorAll("[data-row]")];
  const typing = (at) => at instanceof HTMLElement && (at.isContentEditable || ["INPUT", "SELECT", "TEXTAREA"].includes(at.tagName));

  // "/" searches, "j" and "k" go down and up the rows; enter opens, since a link has the focus.
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (typing(event.target)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "/") {
      const search = document.getElementById("search");
      if (search) {
        event.preventDefault();
        search.focus();
        search.select();
      }
    } else if (event.key === "j" || event.key === "k") {
      const found = rows();
      if (!found.length) return;
      const at = found.findIndex((row) => row.contains(document.activeElement));
      const next = at < 0 ? 0 : Math.min(found.length - 1, Math.max(0, at + (event.key === "j" ? 1 : -1)));
      const link = found[next].querySelector("[data-open]");
      if (link) {
        event.preventDefault();
        link.focus();
        link.scrollIntoView({ block: "nearest" });
      }
    }
  });

  // Times in the zone of whoever looks.
  const localize = (root) => {
    for (const time of root.querySelectorAll("time[data-ms]")) {
      const when = new Date(Number(time.dataset.ms));
      if (!Number.isNaN(when.getTime())) {
        time.title = time.textContent;
        time.textContent = when.toLocaleString();
      }
    }
  };
  localize(document);

  const events = document.body.dataset.events;
  const liveness = document.getElementById("liveness");
  if (!events || !window.EventSource) return;
  let asking = false;
  let again = false;
  const renew = async () => {
    if (asking) {
      again = true;
      return;
    }
    asking = true;
    try {
      const answer = await fetch(location.href, { headers: { accept: "text/html" }, credentials: "same-origin" });
      if (!answer.ok) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("live");
      const old = document.getElementById("live");
      if (!fresh || !old) {
        location.reload();
        return;
      }
      // What was open stays open, and the focus where it was.
      const name = (one) => one.querySelector("summary .name")?.textContent ?? one.querySelector("summary")?.textContent;
      const open = new Map([...old.querySelectorAll("details")].map((one) => [name(one), one.open]));
      for (const one of fresh.querySelectorAll("details")) {
        if (open.has(name(one))) one.open = open.get(name(one));
      }
      const focused = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
      old.replaceWith(document.adoptNode(fresh));
      localize(fresh);
      document.title = page.title;
      if (focused) [...fresh.querySelectorAll("a")].find((link) => link.getAttribute("href") === focused)?.focus();
    } finally {
      asking = false;
      if (again) {
        again = false;
        renew();
      }
    }
  };
  const source = new EventSource(events);
  source.addEventListener("changed", renew);
  source.onopen = () => { liveness.textContent = "live"; };
  source.onerror = () => { liveness.textContent = "not live: the server does not answer"; };
  addEventListener("pagehide", () => source.close());
})();
