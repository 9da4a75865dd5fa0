"use strict";
// Behaviour of the page: charts, drawings, kernels and changes on demand; search; keys; light and dark.
// Every number comes from the JSON in #data. Names and lines are set as text, never as HTML.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  const make = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  };

  // ------------------------------------------------------------------ numbers, as html_report.py writes them
  const at = (path) => path.split(".").reduce((value, key) => value[key], data);
  const groups = (value, digits) => value.toFixed(digits).replace(/\B(?<!\.\d*)(?=(\d{3})+(?!\d))/g, ",");
  const small = (value) => {
    if (value === 0) return "0";
    const [digits, power] = value.toExponential(2).split("e");
    const exponent = Number(power);
    if (exponent >= -4 && exponent < 3) return String(Number(value.toPrecision(3)));
    const sign = exponent < 0 ? "-" : "+";
    return `${Number(digits)}e${sign}${String(Math.abs(exponent)).padStart(2, "0")}`;
  };
  const forms = {
    count: (value) => groups(value, 0),
    number: (value) => groups(value, Number.isInteger(value) ? 0 : 1),
    ratio: (value) => `${groups(value, 2)}x`,
    fixed4: (value) => groups(value, 4),
    percent: (value) => `${value >= 0 ? "+" : ""}${groups(value, 2)}%`,
    megabytes: (value) => `${groups(value / 1e6, 1)} MB`,
    small,
  };
  const show = (path, form) => {
    const element = make("span", "", forms[form](at(path)));
    element.dataset.path = path;
    element.dataset.form = form;
    return element;
  };

  // ------------------------------------------------------------------ compressed parts
  let folded = null;
  const unfold = () => {
    folded ??= (async () => {
      const bytes = Uint8Array.from(atob($("folded").textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
      return JSON.parse(await new Response(stream).text());
    })();
    return folded;
  };
  const drawing = (svg) => make("div", "", new DOMParser().parseFromString(svg, "image/svg+xml").documentElement);
  const highlighted = (pieces, parts) => parts.map((i) => pieces[i]).join("\n\n");

  // ------------------------------------------------------------------ charts
  const config = {
    background: null,
    view: { stroke: null },
    font: "system-ui, sans-serif",
    axis: { labelColor: "var(--faint)", titleColor: "var(--faint)", gridColor: "var(--line)", domainColor: "var(--line)", tickColor: "var(--line)", titleFontWeight: 400, labelFontSize: 11, titleFontSize: 11 },
    legend: { labelColor: "var(--faint)", titleColor: "var(--faint)", labelFontSize: 11, titleFontWeight: 400 },
    text: { color: "var(--ink)", fontSize: 11 },
  };
  const planned = data.sites.map((site, index) => ({ site, index })).filter(({ site }) => site.plan);
  const sides = planned.flatMap(({ site, index }) => site.plan.sides.map((side) => ({ site, index, side })));
  const seen = sides.filter(({ side }) => side.evidence);
  const label = (index) => data.shorts[index];
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const chunks = (values) => Array.from({ length: Math.ceil(values.length / data.chunk) }, (_, i) => values.slice(i * data.chunk, (i + 1) * data.chunk));
  const onSide = (element) => seen.filter(({ side }) => side.side === element.dataset.side || side.side === "keys and values");
  const rows = {
    size: () => ({ size: sides.map(({ site, index, side }) => ({ site: site.name, index: label(index), side: side.side, bytes: side.bytes, exact: site.exact_bytes })) }),
    sensitivity: () => ({
      sensitivity: seen.flatMap(({ site, index, side }) => [
        ["2 bits each", side.evidence.sensitivity_nats], ["the plan", side.evidence.nats],
      ].filter(([, nats]) => nats > 0).map(([kind, nats]) => ({ site: site.name, index: label(index), side: side.side, kind, nats }))),
    }),
    curve: () => ({
      curve: data.plan.curve.map((size) => ({ ...size, label: `${Number(size.ratio.toFixed(2))}x`, chosen: size.ratio === data.plan.provenance.ratio })),
    }),
    spectra: (element) => ({
      spectra: onSide(element).flatMap(({ site, index, side }) => chunks(side.evidence.spectrum).map((part, chunk) => ({ site: site.name, index: label(index), side: side.side, chunk, value: Math.max(sum(part), 1e-12) }))),
    }),
    bits: (element) => ({
      bits: onSide(element).flatMap(({ site, index, side }) => side.evidence.bits.map((value, chunk) => ({ site: site.name, index: label(index), side: side.side, chunk, value }))),
    }),
    roofline: (element) => {
      const roof = data.rooflines[element.dataset.index];
      const ridge = (1000 * roof.tflops) / roof.bandwidth_gb_s;
      const xs = roof.points.map((point) => point.intensity);
      const from = Math.min(...xs, ridge) / 3, to = Math.max(...xs, ridge) * 3;
      const line = [from, ridge, to].map((intensity) => ({ intensity, tflops: Math.min(roof.tflops, (intensity * roof.bandwidth_gb_s) / 1000) }));
      return { roof: line, points: roof.points };
    },
    spectrum: (element) => {
      const evidence = data.sites[element.dataset.site].plan.sides[element.dataset.index].evidence;
      const powers = evidence.spectrum.map((nats) => Math.log10(Math.max(nats, 1e-12)));
      const floor = Math.min(...powers) - 0.2;
      return { spectrum: evidence.spectrum.map((nats, channel) => ({ channel, nats, exponent: powers[channel], floor, bits: evidence.bits[Math.floor(channel / data.chunk)] })) };
    },
  };
  const chart = async (element) => {
    if (element.dataset.drawn) return;
    element.dataset.drawn = "yes";
    const name = element.dataset.chart;
    const spec = { ...structuredClone(data.charts[name]), datasets: rows[name](element), config };
    if (spec.height.step) spec.height = spec.height.step * new Set(spec.datasets[name].map((row) => row.index)).size;
    const cells = Object.values(spec.datasets).reduce((count, list) => count + list.length, 0);
    await vegaEmbed(element, spec, { actions: false, ast: true, renderer: cells > 3000 ? "canvas" : "svg", tooltip: { theme: "custom" } });
  };
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      watch.unobserve(entry.target);
      chart(entry.target);
    }
  }, { rootMargin: "300px" });
  all(".chart").forEach((element) => watch.observe(element));

  // ------------------------------------------------------------------ a site
  const figure = (title, ...content) => make("figure", "", make("figcaption", "", title), ...content);
  const pair = (name, ...value) => make("tr", "", Object.assign(make("th", "", name), { scope: "row" }), make("td", "", ...value));
  const facts = (site, index) => {
    const path = `sites.${index}`;
    const names = Object.entries(site.projections).map(([role, parameters]) => `${role}: ${parameters.join(" + ")}`);
    const table = make("table", "",
      pair("name", make("code", "", site.name)),
      pair("projections", make("code", "", names.join("\n"))),
      pair("source", make("code", "", site.source || "unknown")),
      pair("scale, cache", show(`${path}.scale`, "small"), `, ${site.cache}`),
      pair("exact: bytes of a decode step", make("code", "", site.formulas.bytes)),
      pair("exact: operations", make("code", "", site.formulas.operations)));
    if (site.plan) {
      table.append(
        pair("plan: bytes of a decode step", make("code", "", site.plan.formulas.bytes)),
        pair("plan: operations", make("code", "", site.plan.formulas.operations)));
      if (site.plan.page_share < 1) table.append(pair("share of pages read", show(`${path}.plan.page_read`, "small"), ", on average; formulas count all pages"));
      site.plan.pays.forEach((pays, i) => {
        const when = pays.tokens === null ? [pays.verdict] : ["from ", show(`${path}.plan.pays.${i}.tokens`, "count"), " cached tokens on"];
        table.append(pair(`faster on ${pays.device}`, ...when));
      });
    }
    table.querySelectorAll("code").forEach((code) => { code.style.whiteSpace = "pre-wrap"; });
    return make("div", "scroll", table);
  };
  const kernelsOf = (name) => data.kernels.map((kernel, index) => ({ kernel, index })).filter(({ kernel }) => kernel.sites.includes(name));
  const fillSite = async (details) => {
    const panel = details.querySelector(".panel");
    if (panel.childElementCount) return;
    const index = Number(details.dataset.index), site = data.sites[index];
    const [before, after] = data.drawn[index] ?? [-1, -1];
    const pictures = make("div", "drawings"), spectra = make("div", "charts"), code = make("div");
    panel.append(pictures, spectra, make("h3", "", "Facts"), facts(site, index), code);
    const long = await unfold();
    if (before >= 0) pictures.append(figure("Exact", drawing(long.drawings[before])));
    if (after >= 0) pictures.append(figure("With the plan", drawing(long.drawings[after])));
    (site.plan?.sides ?? []).forEach((side, i) => {
      if (!side.evidence) return;
      const element = make("div", "chart");
      Object.assign(element.dataset, { chart: "spectrum", site: index, index: i });
      spectra.append(figure(`Spectrum and bits of ${side.side}`, element));
      watch.observe(element);
    });
    kernelsOf(site.name).forEach(({ kernel, index: k }, i) => {
      if (i === 0) code.append(make("h3", "", "Kernels"));
      const link = Object.assign(make("a", "", kernel.file), { href: `#kernel-${k}` });
      const shown = make("details", "kernel", make("summary", "", make("code", "", kernel.file), make("span", "note", ` ${kernel.language === "cpp" ? "C++" : "Triton"}, `), show(`kernels.${k}.lines`, "count"), " lines"), make("p", "links", "Sites that run it: ", link), Object.assign(make("pre", "code"), { tabIndex: 0 }));
      shown.dataset.index = k;
      shown.addEventListener("toggle", () => shown.open && fillKernel(shown));
      code.append(shown);
      if (i === 0) shown.open = true;
    });
  };
  const fillKernel = async (details) => {
    const pre = details.querySelector("pre"), index = Number(details.dataset.index);
    if (pre.childElementCount) return;
    const long = await unfold();
    pre.innerHTML = highlighted(long.pieces, long.kernels[index]); // Pygments' own, escaped when it was made
    const links = details.querySelector("[data-links]");
    if (!links) return;
    data.kernels[index].sites.forEach((name) => {
      const place = data.sites.findIndex((site) => site.name === name);
      if (place >= 0) links.append(Object.assign(make("a", "", data.shorts[place]), { href: `#site-${place}`, title: name }));
    });
  };
  const fillStage = async (details) => {
    const panel = details.querySelector(".panel"), index = Number(details.dataset.index);
    if (panel.childElementCount) return;
    const changes = (await unfold()).changes[index];
    if (!changes.length) panel.append(make("p", "note", "No change."));
    changes.forEach((lines, i) => {
      const times = data.stages[index].changes[i];
      if (times > 1) panel.append(make("p", "times", "in ", show(`stages.${index}.changes.${i}`, "count"), " places, the first:"));
      panel.append(make("pre", "diff", ...lines.map((line) => make("span", { "+": "plus", "-": "minus" }[line[0]] ?? "at", line))));
    });
  };
  const fillers = { site: fillSite, kernel: fillKernel, stage: fillStage };
  for (const [kind, fill] of Object.entries(fillers)) {
    all(`details.${kind}`).forEach((details) => details.addEventListener("toggle", () => details.open && fill(details)));
  }
  const reveal = () => {
    const target = location.hash.length > 1 && $(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") { target.hidden = false; target.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", reveal);

  // ------------------------------------------------------------------ search
  const search = $("search"), sites = all("details.site"), findable = all("[data-find]");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    findable.forEach((element) => { element.hidden = !words.every((word) => element.dataset.find.includes(word)); });
    const shown = sites.filter((site) => !site.hidden).length;
    $("shown").textContent = words.length ? `${groups(shown, 0)} of ${groups(sites.length, 0)}` : "";
    $("nothing").hidden = shown > 0;
  };
  search.addEventListener("input", filter);

  // ------------------------------------------------------------------ keys, light and dark
  const root = document.documentElement;
  const theme = (name) => { root.dataset.theme = name; };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  theme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  const toggle = () => theme(root.dataset.theme === "dark" ? "light" : "dark");
  $("theme").addEventListener("click", toggle);
  const MOST = 40; // that are opened at once
  $("expand").addEventListener("click", () => sites.filter((site) => !site.hidden).slice(0, MOST).forEach((site) => { site.open = true; }));
  $("collapse").addEventListener("click", () => all("details[open]").forEach((details) => { details.open = false; }));
  const step = (by) => {
    const shown = sites.filter((site) => !site.hidden);
    const now = shown.findIndex((site) => site.contains(document.activeElement));
    const next = shown[Math.min(shown.length - 1, Math.max(0, now + by))];
    next?.querySelector("summary").focus();
    next?.scrollIntoView({ block: "nearest" });
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (document.activeElement === search) {
      if (event.key === "Escape") { search.value = ""; filter(); search.blur(); }
      return;
    }
    const act = { "/": () => search.focus(), j: () => step(1), k: () => step(-1), t: toggle }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  reveal();
})();
