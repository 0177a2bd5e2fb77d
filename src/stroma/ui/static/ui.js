"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const typing = (at) => at instanceof HTMLElement && (at.isContentEditable || ["INPUT", "SELECT", "TEXTAREA"].includes(at.tagName));

  // ---------------------------------------------------------------- keys

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      const menu = $(".menu[open]");
      if (menu) {
        menu.open = false;
        $("summary", menu).focus();
      } else if (typing(event.target)) event.target.blur();
      else shut();
      return;
    }
    if (typing(event.target)) return;
    if (event.key === "/") {
      const search = document.getElementById("search");
      if (search) {
        event.preventDefault();
        search.focus();
        search.select();
      }
    } else if (event.key === "j" || event.key === "k") {
      const found = $$("[data-row]").filter((row) => row.checkVisibility());
      if (!found.length) return;
      const at = found.findIndex((row) => row.contains(document.activeElement));
      const next = at < 0 ? 0 : Math.min(found.length - 1, Math.max(0, at + (event.key === "j" ? 1 : -1)));
      const link = $("[data-open]", found[next]);
      if (link) {
        event.preventDefault();
        link.focus();
        link.scrollIntoView({ block: "nearest" });
      }
    }
  });

  // One menu is open at a time.
  document.addEventListener("click", (event) => {
    for (const menu of $$(".menu[open]")) if (!menu.contains(event.target)) menu.open = false;
  });

  // ---------------------------------------------------------------- times

  const since = (seconds) => {
    if (seconds < 9.995) return `${seconds.toFixed(2)} s`;
    if (seconds < 99.95) return `${seconds.toFixed(1)} s`;
    const minutes = Math.floor(Math.round(seconds) / 60);
    if (minutes < 100) return `${minutes} m ${String(Math.round(seconds) % 60).padStart(2, "0")} s`;
    const hours = Math.floor(minutes / 60);
    if (hours < 48) return `${hours} h ${String(minutes % 60).padStart(2, "0")} m`;
    return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  };
  const ago = (ms) => {
    const seconds = Math.max(0, (now() - ms) / 1000);
    for (const [size, name] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (seconds >= size) return `${Math.floor(seconds / size)} ${name} ago`;
    return seconds < 5 ? "just now" : `${Math.floor(seconds)} s ago`;
  };
  // By the clock of the server: that of the reader may differ.
  const skew = Number(document.body.dataset.now || Date.now()) - Date.now();
  const now = () => Date.now() + skew;
  const localize = (root) => {
    for (const time of $$("time[data-ms]", root)) {
      const when = new Date(Number(time.dataset.ms));
      if (Number.isNaN(when.getTime())) continue;
      time.title = when.toLocaleString(undefined, { dateStyle: "full", timeStyle: "long" });
      time.textContent = time.dataset.full === undefined ? ago(when.getTime()) : when.toLocaleString();
    }
  };
  const tick = () => {
    for (const one of $$("[data-since]")) one.textContent = since(Math.max(0, now() - Number(one.dataset.since)) / 1000);
    const chart = $(".gantt[data-began]");
    if (!chart) return;
    const at = (100 * (now() - Number(chart.dataset.began))) / Number(chart.dataset.span);
    if (at > 100) {
      // All open pages ask with the same name of a state, so that one of them is rendered for all.
      if (document.body.dataset.events) renew(`${state}.${Math.floor(now() / 5000)}`);
      return;
    }
    for (const line of $$(".now line", chart)) for (const x of ["x1", "x2"]) line.setAttribute(x, `${at}%`);
    for (const bar of $$(".b-running", chart)) bar.setAttribute("width", `${Math.max(0.4, at - parseFloat(bar.getAttribute("x")))}%`);
  };
  localize(document);
  setInterval(() => localize(document), 10000);
  if ($("[data-since], .gantt[data-began]")) setInterval(tick, 250);

  // ---------------------------------------------------------------- the selected attempt, beside the run

  const panel = document.getElementById("panel");
  let chosen = "";
  const mark = () => {
    for (const link of $$(".gantt a")) link.classList.toggle("sel", link.getAttribute("href") === chosen);
  };
  const shut = () => {
    if (!panel || !chosen) return;
    chosen = "";
    panel.hidden = true;
    panel.replaceChildren();
    panel.parentElement.classList.remove("has");
    history.replaceState(null, "", location.pathname + location.search);
    mark();
  };
  const show = async (address, focus) => {
    chosen = address;
    let found = null;
    try {
      const answer = await fetch(address, { headers: { accept: "text/html" }, credentials: "same-origin" });
      found = answer.ok ? $("#attempt", new DOMParser().parseFromString(await answer.text(), "text/html")) : null;
    } catch {}
    if (chosen !== address) return;
    if (!found) {
      location.href = address;
      return;
    }
    const close = document.createElement("button");
    close.className = "small shut";
    close.type = "button";
    close.textContent = "Close";
    close.addEventListener("click", shut);
    const whole = document.createElement("a");
    whole.href = address;
    whole.textContent = "Open its own page";
    const foot = document.createElement("p");
    foot.className = "more";
    foot.append(whole);
    panel.replaceChildren(close, document.adoptNode(found), foot);
    // Headings in order: the page has its own first one.
    panel.hidden = false;
    panel.scrollTop = 0;
    panel.parentElement.classList.add("has");
    history.replaceState(null, "", `${location.pathname}${location.search}#${address}`);
    localize(panel);
    mark();
    if (focus) {
      panel.focus({ preventScroll: innerWidth >= 1180 });
      if (innerWidth < 1180) panel.scrollIntoView({ block: "start" });
    }
  };
  if (panel) {
    document.addEventListener("click", (event) => {
      const link = event.target instanceof Element ? event.target.closest('a[href^="/attempt?"]') : null;
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
      if (!link.closest(".gantt, .strip, [data-row], .tries, .cause")) return;
      event.preventDefault();
      show(link.getAttribute("href"), true);
    });
    const asked = location.hash.slice(1);
    if (asked.startsWith("/attempt?")) show(asked, false);
    else if (panel.dataset.first && innerWidth >= 1360) show(panel.dataset.first, false);
  }

  // ---------------------------------------------------------------- a map as a strip of cells

  const words = { g: "succeeded", r: "succeeded after a retry", b: "failed", w: "stopped", x: "no attempt yet" };
  const cellAt = (strip, event) => {
    const box = strip.getBoundingClientRect();
    const size = box.width / Number(strip.dataset.columns);
    const column = Math.floor((event.clientX - box.left) / size);
    const at = Math.floor((event.clientY - box.top) / size) * Number(strip.dataset.columns) + column;
    return at >= 0 && at < strip.dataset.cells.length ? at : -1;
  };
  document.addEventListener("pointermove", (event) => {
    const strip = event.target instanceof Element ? event.target.closest(".cells") : null;
    if (!strip) return;
    const at = cellAt(strip, event);
    const say = $("output", strip.closest(".strip"));
    const frame = $(".at", strip);
    if (at < 0) return;
    const columns = Number(strip.dataset.columns);
    const size = Number(strip.dataset.size);
    frame.setAttribute("d", `M${(at % columns) * size} ${Math.floor(at / columns) * size}h${size}v${size}h${-size}z`);
    say.textContent = `item ${at}: ${words[strip.dataset.cells[at]]}`;
  });
  document.addEventListener("click", (event) => {
    const strip = event.target instanceof Element ? event.target.closest(".cells") : null;
    if (!strip || !panel) return;
    const at = cellAt(strip, event);
    if (at < 0 || strip.dataset.cells[at] === "x") return;
    const places = strip.dataset.places ? strip.dataset.places.split(" ") : null;
    const place = places ? places[at] : `${strip.dataset.prefix}${at}`;
    show(`${strip.dataset.attempt}&at=${encodeURIComponent(place)}`, true);
  });

  // ---------------------------------------------------------------- zoom of the time axis: drag over it

  let drag = null;
  document.addEventListener("pointerdown", (event) => {
    const axis = event.target instanceof Element ? event.target.closest(".axis .lane") : null;
    if (!axis || event.button || axis.closest(".gantt").dataset.from === undefined) return;
    drag = { axis, start: event.clientX };
    event.preventDefault();
  });
  const part = (x) => {
    const box = drag.axis.getBoundingClientRect();
    return Math.min(1, Math.max(0, (x - box.left) / box.width));
  };
  document.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const [a, b] = [part(drag.start), part(event.clientX)].sort((x, y) => x - y);
    const pick = $(".pick", drag.axis);
    pick.setAttribute("x", `${100 * a}%`);
    pick.setAttribute("width", `${100 * (b - a)}%`);
  });
  document.addEventListener("pointerup", (event) => {
    if (!drag) return;
    const [a, b] = [part(drag.start), part(event.clientX)].sort((x, y) => x - y);
    const { from, to } = drag.axis.closest(".gantt").dataset;
    drag = null;
    if (b - a < 0.01) return;
    const [start, span] = [Number(from), Number(to) - Number(from)];
    const url = new URL(location.href);
    url.searchParams.set("from", (start + a * span).toFixed(3));
    url.searchParams.set("to", (start + b * span).toFixed(3));
    location.href = url.href;
  });

  // ---------------------------------------------------------------- graphs: pan, zoom, fit

  for (const view of $$(".view")) {
    const image = $("svg, img", view);
    let [width, height, scale] = [0, 0, 1];
    const size = () => {
      width = Number(image.getAttribute("width")) || image.naturalWidth;
      height = Number(image.getAttribute("height")) || image.naturalHeight;
    };
    const apply = (next, x = view.clientWidth / 2, y = view.clientHeight / 2) => {
      if (!width) return;
      next = Math.min(4, Math.max(0.1, next));
      const [left, top] = [(view.scrollLeft + x) / scale, (view.scrollTop + y) / scale];
      scale = next;
      image.style.width = `${width * scale}px`;
      image.style.height = `${height * scale}px`;
      view.scrollLeft = left * scale - x;
      view.scrollTop = top * scale - y;
      view.classList.toggle("pan", view.scrollWidth > view.clientWidth + 1 || view.scrollHeight > view.clientHeight + 1);
    };
    const fit = () => apply(Math.min(1, (view.clientWidth - 2) / width));
    // On a narrow screen it begins at its left, large enough to be read.
    const ready = () => {
      size();
      apply(Math.max(0.5, Math.min(1, (view.clientWidth - 2) / width)));
      view.scrollTo(0, 0);
    };
    if (image.tagName === "IMG" && !image.complete) image.addEventListener("load", ready);
    else ready();
    const steps = { in: () => apply(scale * 1.25), out: () => apply(scale / 1.25), fit, full: () => apply(1) };
    for (const button of $$("[data-zoom]", view.parentElement)) {
      button.hidden = false;
      button.addEventListener("click", steps[button.dataset.zoom]);
    }
    view.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      const box = view.getBoundingClientRect();
      apply(scale * Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    view.addEventListener("keydown", (event) => {
      const step = { "+": "in", "=": "in", "-": "out", "0": "fit" }[event.key];
      if (step) steps[step]();
    });
    let held = null;
    view.addEventListener("pointerdown", (event) => {
      if (event.button || event.pointerType === "touch" || event.target.closest("a")) return;
      held = [event.clientX + view.scrollLeft, event.clientY + view.scrollTop];
      view.setPointerCapture(event.pointerId);
      view.classList.add("drag");
    });
    view.addEventListener("pointermove", (event) => {
      if (held) view.scrollTo(held[0] - event.clientX, held[1] - event.clientY);
    });
    view.addEventListener("pointerup", () => {
      held = null;
      view.classList.remove("drag");
    });
    // What feeds a node, and what it feeds.
    view.addEventListener("pointerover", (event) => {
      const box = event.target instanceof Element ? event.target.closest("[data-at]") : null;
      image.classList.toggle("dimmed", box !== null);
      for (const link of $$(".link[data-from]", image)) {
        link.classList.toggle("lit", box !== null && (link.dataset.from === box.dataset.at || link.dataset.to === box.dataset.at));
      }
    });
    view.addEventListener("pointerleave", () => image.classList.remove("dimmed"));
  }

  for (const one of $$("[data-script]")) one.hidden = false;

  // ---------------------------------------------------------------- live

  const events = document.body.dataset.events;
  const liveness = document.getElementById("liveness");
  // The state of the store that the last event named.
  let state = "";
  let asking = false;
  let again = false;
  const swap = (old, fresh) => {
    // What was open stays open, what was chosen stays chosen, and the focus where it was.
    const name = (one) => $("summary .name", one)?.textContent ?? $("summary", one)?.textContent;
    const open = new Map($$("details", old).map((one) => [name(one), one.open]));
    for (const one of $$("details", fresh)) if (open.has(name(one))) one.open = open.get(name(one));
    const checked = new Set($$("input:checked", old).map((one) => one.value));
    for (const one of $$("input[type=checkbox]", fresh)) one.checked = checked.has(one.value);
    const focused = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const scrolled = $(".tall", old)?.scrollTop;
    old.replaceWith(document.adoptNode(fresh));
    localize(fresh);
    if (scrolled) $(".tall", fresh)?.scrollTo(0, scrolled);
    if (focused) $$("a", fresh).find((link) => link.getAttribute("href") === focused)?.focus();
  };
  const renew = async (named = state) => {
    if (asking || document.hidden || $(".menu[open]")) {
      again = true;
      return;
    }
    asking = true;
    try {
      const answer = await fetch(location.href.split("#")[0], { headers: { accept: "text/html", ...(named && { "x-stroma-state": named }) }, credentials: "same-origin" });
      if (answer.status === 404) location.reload(); // The run was deleted.
      if (!answer.ok) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const old of $$("[data-live]")) {
        const fresh = page.getElementById(old.id);
        if (!fresh) {
          location.reload();
          return;
        }
        swap(old, fresh);
      }
      document.title = page.title;
      mark();
      tick();
      for (const one of $$("[data-script]")) one.hidden = false;
    } finally {
      // At most once a second, however often the store changes.
      setTimeout(() => {
        asking = false;
        retry();
      }, 1000);
    }
  };
  const retry = () => {
    if (!again || asking) return;
    again = false;
    renew();
  };
  document.addEventListener("toggle", () => setTimeout(retry, 0), true);
  document.addEventListener("visibilitychange", retry);
  if (!events || !window.EventSource) return;
  const source = new EventSource(events);
  source.addEventListener("changed", (event) => {
    state = JSON.parse(event.data).state;
    renew();
  });
  source.addEventListener("text", (event) => {
    const boxes = JSON.parse(event.data).map((one) => {
      const box = document.createElement("section");
      const [name, text] = [document.createElement("b"), document.createElement("pre")];
      box.className = "box writing";
      name.textContent = `${one.node} is writing`;
      text.textContent = one.text;
      box.append(name, text);
      return box;
    });
    document.getElementById("texts")?.replaceChildren(...boxes);
    for (const one of $$("#texts pre")) one.scrollTop = one.scrollHeight;
  });
  source.onopen = () => {
    liveness.textContent = "live";
    liveness.className = "on";
  };
  source.onerror = () => {
    liveness.textContent = "not live: the server does not answer";
    liveness.className = "";
  };
  addEventListener("pagehide", () => source.close());
})();
