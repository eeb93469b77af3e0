// The laboratory of recorded runs: every value that was recorded, in the page itself; nothing is loaded or computed.
// eos_utils/lab_runs.py writes the data, with phases and anomaly points; a browser test compares what is shown with the
// records.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const LEAST = 20; // steps in view
  const TALL = { eig: 230, norm: 110, loss: 150 };
  const TITLES = { eig: "eigenvalues", norm: "‖A‖²", loss: "loss (logarithmic)" };
  const FRAME = { left: 54, right: 10, top: 20, gap: 12, bottom: 24 };

  const grouped = (step) => step.toLocaleString("en");
  const five = (value) => value.toPrecision(5);

  const draw = (parent, name, attributes = {}, text = "") => {
    const found = document.createElementNS(SVG, name);
    for (const [k, v] of Object.entries(attributes)) found.setAttribute(k, v);
    found.textContent = text;
    parent.append(found);
    return found;
  };

  const add = (parent, name, properties = {}, ...children) => {
    const found = Object.assign(document.createElement(name), properties);
    found.append(...children);
    parent.append(found);
    return found;
  };

  // 32-bit floats, little-endian, in base64.
  function decode(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  }

  class Series {
    constructor({ panel, name, begin, stride, values }) {
      Object.assign(this, { panel, name, begin, stride });
      this.values = decode(values);
      this.last = begin + stride * (this.values.length - 1);
    }

    // The last recorded value at a step up to t: [step, value], or nothing before the first.
    at(t) {
      if (t < this.begin) return null;
      const i = Math.min(Math.floor((t - this.begin) / this.stride), this.values.length - 1);
      return [this.begin + this.stride * i, this.values[i]];
    }

    // Points [step, value] from step a to step b, and one more at either end, for the line to go on.
    between(a, b) {
      const low = Math.max(Math.floor((a - this.begin) / this.stride), 0);
      const high = Math.min(Math.ceil((b - this.begin) / this.stride), this.values.length - 1);
      const found = [];
      for (let i = low; i <= high; i++) found.push([this.begin + this.stride * i, this.values[i]]);
      return found;
    }
  }

  // Round numbers in [low, high], about `count` of them.
  function ticks(low, high, count) {
    const raw = (high - low) / count || 1;
    const size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((m) => m * size >= raw) * size;
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
    return found;
  }

  function logarithmic(low, high) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const m of [1, 2, 5]) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(m * 10 ** e);
    const decades = found.filter((v) => Number.isInteger(Math.round(Math.log10(v) * 1e6) / 1e6));
    return found.length < 3 ? ticks(low, high, 5) : found.length > 6 ? decades : found;
  }

  const written = (value) => String(Number(value.toPrecision(6))).replace(/e\+?/, "e");

  class Laboratory {
    constructor(host) {
      this.host = host;
      this.runs = JSON.parse(host.querySelector("script").textContent);
      this.build();
      this.choose(0);
      new ResizeObserver(() => this.draw()).observe(this.chart);
      host.classList.add("eos-live"); // the picture in its place goes
    }

    // ---- controls ----------------------------------------------------------------------------------

    build() {
      const form = add(this.host, "form", { className: "lab-controls" });
      form.setAttribute("aria-label", "What is shown");
      form.addEventListener("submit", (event) => event.preventDefault());
      this.select = document.createElement("select");
      this.select.name = "run";
      const papers = { FG: "FG: eigenvalues of the Hessian", SG: "SG: eigenvalues of the Gram matrix M" };
      for (const paper of new Set(this.runs.map((run) => run.paper))) {
        const group = add(this.select, "optgroup", { label: papers[paper] ?? paper });
        this.runs.forEach((run, i) => {
          if (run.paper !== paper) return;
          const many = run.series.filter((s) => s.panel === "eig").length;
          group.append(new Option(`${run.title} (${many} eigenvalue${many > 1 ? "s" : ""})`, String(i)));
        });
      }
      this.select.addEventListener("change", () => this.choose(Number(this.select.value)));
      add(form, "label", { className: "lab-wide" }, "recorded run", this.select);
      this.many = this.range(form, "eigenvalues", "eigenvalues", () => this.draw());
      this.slider = this.range(form, "cursor", "step", () => this.point(Number(this.slider.input.value)));
      const check = (text) => {
        const box = document.createElement("input");
        Object.assign(box, { type: "checkbox", checked: true });
        box.addEventListener("change", () => this.draw());
        const label = add(form, "label", { className: "lab-check" }, box, text);
        return { box, label };
      };
      this.phases = check("phases shaded");
      this.anomalies = check("anomaly points");
      const buttons = add(form, "div", { className: "lab-buttons lab-wide" });
      const button = (textContent, act) => add(buttons, "button", { type: "button", textContent }).addEventListener("click", act);
      button("Zoom in", () => this.zoom(0.5));
      button("Zoom out", () => this.zoom(2));
      button("Earlier", () => this.shift(-0.5));
      button("Later", () => this.shift(0.5));
      button("Whole run", () => this.look(this.first, this.last));
      this.about = add(this.host, "p", { className: "lab-about" });
      this.key = add(this.host, "ul", { className: "lab-phases" });
      this.key.setAttribute("aria-label", "Colours of the phases");
      this.chart = add(this.host, "div", { className: "lab-chart", tabIndex: 0 });
      this.chart.setAttribute("role", "group");
      this.chart.setAttribute(
        "aria-label",
        "Charts. Left and right: one step, with shift ten. Plus and minus: zoom. Page up and down: move. Escape: whole run.",
      );
      this.told = add(this.host, "p", { className: "lab-told" });
      this.told.setAttribute("role", "status");
      this.read = add(this.host, "div", { className: "lab-values" });
      this.listen();
    }

    range(form, name, text, act) {
      const input = Object.assign(document.createElement("input"), { type: "range", name });
      const output = document.createElement("output");
      add(form, "label", {}, text, input, output);
      input.addEventListener("input", () => {
        output.textContent = grouped(Number(input.value));
        act();
      });
      const set = (least, most, value) => {
        Object.assign(input, { min: least, max: most, step: 1 });
        input.value = value;
        output.textContent = grouped(Number(input.value));
      };
      return { input, set };
    }

    listen() {
      const { chart } = this;
      const step = (event) => this.stepAt(event.clientX);
      chart.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        this.drag = { from: event.clientX };
        chart.setPointerCapture(event.pointerId);
      });
      chart.addEventListener("pointermove", (event) => {
        this.point(step(event));
        if (this.drag) this.band(this.drag.from, event.clientX);
      });
      chart.addEventListener("pointerup", (event) => {
        const from = this.drag?.from;
        this.drag = null;
        this.band(0, 0);
        if (from !== undefined && Math.abs(event.clientX - from) > 8) {
          this.look(...[this.stepAt(from), step(event)].sort((a, b) => a - b));
        } else this.point(step(event));
      });
      chart.addEventListener("pointercancel", () => {
        this.drag = null;
        this.band(0, 0);
      });
      chart.addEventListener("dblclick", () => this.look(this.first, this.last));
      // The wheel alone scrolls the page, as everywhere; with Ctrl it zooms, sideways it moves.
      chart.addEventListener(
        "wheel",
        (event) => {
          const aside = Math.abs(event.deltaX) > Math.abs(event.deltaY);
          if (!event.ctrlKey && !event.metaKey && !aside) return;
          event.preventDefault();
          if (aside) this.shift(Math.sign(event.deltaX) * 0.1);
          else this.zoom(event.deltaY < 0 ? 0.8 : 1.25, step(event));
        },
        { passive: false },
      );
      const keys = {
        ArrowLeft: (shift) => this.point(this.t - (shift ? 10 : 1)),
        ArrowRight: (shift) => this.point(this.t + (shift ? 10 : 1)),
        Home: () => this.point(this.a),
        End: () => this.point(this.b),
        "+": () => this.zoom(0.5),
        "=": () => this.zoom(0.5),
        "-": () => this.zoom(2),
        PageUp: () => this.shift(-0.5),
        PageDown: () => this.shift(0.5),
        Escape: () => this.look(this.first, this.last),
      };
      chart.addEventListener("keydown", (event) => {
        if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        event.stopPropagation();
        keys[event.key](event.shiftKey);
      });
    }

    // ---- what is in view ---------------------------------------------------------------------------

    choose(index) {
      this.run = this.runs[index];
      this.series = this.run.series.map((one) => new Series(one));
      this.first = Math.min(...this.series.map((s) => s.begin));
      this.last = Math.max(...this.series.map((s) => s.last));
      this.flagged = new Set(this.run.anomalies);
      const most = this.series.filter((s) => s.panel === "eig").length;
      this.many.set(1, most, Math.min(most, 6));
      const seen = new Set(this.run.phases.map(([, , name]) => name));
      for (const { box, label } of [this.phases, this.anomalies]) {
        box.disabled = !seen.size;
        label.hidden = !seen.size;
      }
      this.key.replaceChildren();
      this.key.hidden = !seen.size;
      for (const name of ["I", "II", "III", "IV", "hovering"])
        if (seen.has(name)) add(this.key, "li", {}, add(this.key, "span", { className: `lab-swatch lab-in-${name}` }), name);
      add(this.key, "li", {}, add(this.key, "span", { className: "lab-dot" }), "anomaly point");
      const without = seen.size ? "" : " Phases and anomaly points need M at every step, which this run does not have.";
      this.about.textContent = this.run.about + without;
      this.t = this.first;
      this.look(this.first, this.last);
    }

    look(a, b) {
      const span = Math.min(Math.max(Math.round(b - a), LEAST), this.last - this.first);
      this.a = Math.min(Math.max(Math.round(a), this.first), this.last - span);
      this.b = this.a + span;
      this.t = Math.min(Math.max(this.t, this.a), this.b);
      this.draw();
    }

    zoom(factor, centre = this.t) {
      const span = (this.b - this.a) * factor;
      const begin = centre - ((centre - this.a) / (this.b - this.a)) * span;
      this.look(begin, begin + span);
    }

    shift(share) {
      const by = Math.round((this.b - this.a) * share);
      this.look(this.a + by, this.b + by);
    }

    point(step) {
      this.t = Math.min(Math.max(step, this.a), this.b);
      this.tell();
    }

    stepAt(clientX) {
      const { left, width } = this.svg.getBoundingClientRect();
      const inner = width - FRAME.left - FRAME.right;
      return Math.round(this.a + ((clientX - left - FRAME.left) / inner) * (this.b - this.a));
    }

    // The series in view: as many eigenvalues as are asked for, and the others.
    shown() {
      let left = Number(this.many.input.value);
      return this.series.filter((s) => s.panel !== "eig" || left-- > 0);
    }

    edge(t) {
      return this.run.edges.findLast(([from]) => from <= t)?.[1] ?? this.run.edges[0][1];
    }

    // ---- drawing -----------------------------------------------------------------------------------

    draw() {
      const width = Math.max(Math.round(this.chart.clientWidth), 240);
      this.inner = width - FRAME.left - FRAME.right;
      this.x = (step) => ((step - this.a) / (this.b - this.a)) * this.inner;
      const shown = this.shown();
      const names = ["eig", "norm", "loss"].filter((panel) => shown.some((s) => s.panel === panel));
      const height = names.reduce((sum, name) => sum + FRAME.top + TALL[name] + FRAME.gap, FRAME.bottom);
      const label = `${this.run.title}: ${names.map((n) => TITLES[n]).join(", ")}, steps ${grouped(this.a)} to ${grouped(this.b)}`;
      this.chart.replaceChildren();
      this.svg = draw(this.chart, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
      let top = FRAME.top;
      this.panels = names.map((name) => {
        const panel = this.panel(name, top, shown.filter((s) => s.panel === name));
        top += TALL[name] + FRAME.gap + FRAME.top;
        return panel;
      });
      const base = top - FRAME.top - FRAME.gap;
      for (const step of ticks(this.a, this.b, Math.max(this.inner / 80, 3))) {
        if (!Number.isInteger(step)) continue;
        const x = FRAME.left + this.x(step);
        const anchor = x > width - 30 ? "end" : "middle";
        draw(this.svg, "text", { x: anchor === "end" ? width - 2 : x, y: base + 16, "text-anchor": anchor }, step === this.a ? `step ${grouped(step)}` : grouped(step));
      }
      this.cross = draw(this.svg, "line", { class: "lab-cross", y1: FRAME.top, y2: base });
      this.brush = draw(this.svg, "rect", { class: "lab-brush", y: FRAME.top, height: base - FRAME.top, width: 0 });
      this.slider.set(this.a, this.b, this.t);
      this.tell();
    }

    panel(name, top, series) {
      const tall = TALL[name];
      const lines = series.map((s) => s.between(this.a, this.b));
      let low = Infinity;
      let high = -Infinity;
      for (const points of lines)
        for (const [, v] of points) {
          low = Math.min(low, v);
          high = Math.max(high, v);
        }
      const steps = this.run.edges.filter(([from], i, all) => from <= this.b && (all[i + 1]?.[0] ?? Infinity) > this.a);
      if (name === "eig")
        for (const [, v] of steps) if (v <= high + 1.5 * (high - low)) [low, high] = [Math.min(low, v), Math.max(high, v)];
      const scale = name === "loss" ? Math.log10 : (v) => v;
      const pad = 0.06 * (scale(high) - scale(low)) || 0.01 * Math.abs(scale(high)) || 1;
      const [bottom, ceiling] = [scale(low) - pad, scale(high) + pad];
      const y = (v) => tall * (1 - (scale(v) - bottom) / (ceiling - bottom));
      draw(this.svg, "text", { x: 2, y: top - 7, class: "lab-title" }, TITLES[name]);
      const marks = name === "loss" ? logarithmic(10 ** bottom, 10 ** ceiling) : ticks(bottom, ceiling, tall / 35);
      for (const v of marks)
        draw(this.svg, "text", { x: FRAME.left - 6, y: top + y(v) + 4, "text-anchor": "end" }, written(v));
      // An inner <svg> cuts off what lies outside of it.
      const area = draw(this.svg, "svg", { x: FRAME.left, y: top, width: this.inner, height: tall, class: `lab-${name}` });
      if (this.phases.box.checked)
        for (const [from, to, label] of this.run.phases) {
          if (to + 0.5 < this.a || from - 0.5 > this.b) continue;
          const [x, end] = [this.x(from - 0.5), this.x(to + 0.5)];
          draw(area, "rect", { x, y: 0, width: end - x, height: tall, class: `lab-phase lab-in-${label}` });
        }
      const grid = draw(area, "g", { class: "lab-grid" });
      for (const v of marks) draw(grid, "line", { x1: 0, x2: this.inner, y1: y(v), y2: y(v) });
      for (let i = series.length - 1; i >= 0; i--) {
        const line = draw(area, "polyline", { class: `lab-line lab-of-${name}` });
        line.style.setProperty("--share", `${series.length > 1 ? Math.round((100 * i) / (series.length - 1)) : 0}%`);
        line.setAttribute("points", lines[i].map(([s, v]) => `${this.x(s).toFixed(2)},${y(v).toFixed(2)}`).join(" "));
      }
      if (name === "eig") {
        if (this.anomalies.box.checked) {
          const dots = lines[0].filter(([s]) => this.flagged.has(s));
          const dense = dots.length > this.inner / 6 ? " lab-dense" : "";
          draw(area, "path", { class: `lab-anomaly${dense}`, d: dots.map(([s, v]) => `M${this.x(s).toFixed(2)} ${y(v).toFixed(2)}h0`).join("") });
        }
        this.dashes(area, steps, y);
        const right = { x: FRAME.left + this.inner, y: top - 7, "text-anchor": "end" };
        if (series.length > 1) {
          draw(this.svg, "text", { ...right, class: "lab-final" }, series.at(-1).name);
          draw(this.svg, "text", { ...right, x: right.x - 24 }, series.length > 2 ? "…" : "");
        }
        draw(this.svg, "text", { ...right, x: right.x - (series.length > 1 ? 42 : 0), class: "lab-first" }, "λ₁");
      }
      const marked = series.map(() => draw(this.svg, "circle", { r: 3, class: "lab-mark" }));
      return { series, marked, y: (v) => top + y(v) };
    }

    // 2/η: dashed, and a step where the step size changes; where it is out of the picture, its value stands at the top.
    dashes(area, steps, y) {
      steps.forEach(([from, v], i) => {
        const [x1, x2] = [Math.max(this.x(from), 0), Math.min(this.x(steps[i + 1]?.[0] ?? this.b), this.inner)];
        const at = y(v);
        const text = `2/η = ${written(Number(v.toPrecision(4)))}`;
        if (at < 0) draw(area, "text", { x: x2 - 4, y: 12, "text-anchor": "end" }, `${text}, above`);
        else {
          draw(area, "line", { x1, x2, y1: at, y2: at, class: "lab-edge" });
          draw(area, "text", { x: x1 + 4, y: at > 18 ? at - 5 : at + 14 }, text);
        }
      });
    }

    band(from, to) {
      const { left } = this.svg.getBoundingClientRect();
      const [a, b] = [from, to].sort((p, q) => p - q).map((v) => Math.min(Math.max(v - left, FRAME.left), FRAME.left + this.inner));
      this.brush.setAttribute("x", a);
      this.brush.setAttribute("width", from === to ? 0 : b - a);
    }

    // ---- the read-out: recorded values, each with the step it was recorded at ------------------------------

    tell() {
      const { t } = this;
      const x = FRAME.left + this.x(t);
      this.cross.setAttribute("x1", x);
      this.cross.setAttribute("x2", x);
      this.slider.input.value = t;
      this.slider.input.nextElementSibling.textContent = grouped(t);
      const phase = this.run.phases.find(([from, to]) => from <= t && t <= to)?.[2];
      const here = [["2/η", this.edge(t)]];
      const rows = new Map([[t, here]]);
      for (const { series, y, marked } of this.panels)
        series.forEach((s, i) => {
          const [step, value] = s.at(t) ?? [];
          const seen = step !== undefined && step >= this.a;
          marked[i].setAttribute("visibility", seen ? "visible" : "hidden");
          if (step === undefined) return;
          marked[i].setAttribute("cx", FRAME.left + this.x(step));
          marked[i].setAttribute("cy", y(value));
          if (!rows.has(step)) rows.set(step, []);
          rows.get(step).push([s.name, value]);
        });
      const one = (step, name) => rows.get(step)?.find(([n]) => n === name)?.[1];
      const words = [`Step ${grouped(t)}`];
      if (phase) words.push(phase === "hovering" ? phase : `phase ${phase}`);
      if (this.flagged.has(t)) words.push("an anomaly point");
      const [, loss] = this.series.at(-1).at(t);
      const [at, top] = this.series[0].at(t);
      const of = at === t ? "" : ` (of step ${grouped(at)})`;
      this.told.textContent = `${words.join(", ")}: λ₁ = ${five(top)}${of}, loss = ${five(one(t, "loss") ?? loss)}.`;
      this.read.replaceChildren();
      for (const [step, values] of [...rows].sort(([a], [b]) => b - a)) {
        const list = add(this.read, "dl");
        for (const [name, value] of [["step", grouped(step)], ...values.map(([n, v]) => [n, five(v)])])
          add(list, "div", {}, add(list, "dt", { textContent: name }), add(list, "dd", { textContent: value }));
      }
    }
  }

  document.querySelectorAll("[data-eos-runs]").forEach((host) => new Laboratory(host));
})();
