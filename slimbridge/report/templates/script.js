(function () {
  "use strict";
  const root = document.documentElement;
  const holder = document.getElementById("specs");
  const specs = holder ? JSON.parse(holder.textContent) : [];
  const button = document.getElementById("theme");
  const choices = ["auto", "light", "dark"];
  let choice = "auto";

  function colour(name) {
    return getComputedStyle(root).getPropertyValue("--" + name).trim();
  }

  function painted(trace, colours) {
    const own = colours[trace.meta.series % colours.length];
    const marker = Object.assign({}, trace.marker, { color: own });
    if (marker.pattern) {
      marker.pattern = Object.assign({}, marker.pattern, { fgcolor: colour("panel"), fgopacity: 0.45 });
    }
    const line = trace.line && Object.assign({}, trace.line, { color: own });
    const error = trace.error_y && Object.assign({}, trace.error_y, { color: own });
    return Object.assign({}, trace, { marker: marker }, line ? { line: line } : {}, error ? { error_y: error } : {});
  }

  function axis(given) {
    const base = {
      gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true, fixedrange: true,
      tickcolor: colour("line"), tickfont: { color: colour("soft"), size: 12 }
    };
    const merged = Object.assign(base, given);
    if (given.title) {
      merged.title = { text: given.title.text, standoff: 8, font: { color: colour("soft"), size: 12 } };
    }
    return merged;
  }

  function layout(given) {
    return Object.assign({}, given, {
      xaxis: axis(given.xaxis), yaxis: axis(given.yaxis), showlegend: given.showlegend === true, dragmode: false, autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 12, t: 10, b: 8 },
      font: { family: getComputedStyle(document.body).fontFamily, color: colour("ink"), size: 12 },
      legend: Object.assign({ font: { color: colour("ink"), size: 12 } }, given.legend),
      hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("ink") }, align: "left" }
    });
  }

  function failed(place, error) {
    place.classList.add("failed");
    place.textContent = "This plot could not be drawn (" + error + "). The tables hold its numbers.";
  }

  function draw() {
    const colours = [0, 1, 2, 3, 4, 5].map(function (index) { return colour("s" + index); });
    specs.forEach(function (spec, index) {
      const place = document.getElementById("plot-" + index);
      try {
        const data = spec.data.map(function (trace) { return painted(trace, colours); });
        Plotly.react(place, data, layout(spec.layout), { displayModeBar: false, responsive: true })
          .catch(function (error) { failed(place, error); });
      } catch (error) {
        failed(place, error);
      }
    });
  }

  function apply(theme) {
    if (theme === "auto") {
      delete root.dataset.theme;
    } else {
      root.dataset.theme = theme;
    }
    draw();
  }

  button.hidden = false;
  button.addEventListener("click", function () {
    choice = choices[(choices.indexOf(choice) + 1) % choices.length];
    button.querySelector("b").textContent = choice;
    apply(choice);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", function () { apply("light"); });
  addEventListener("afterprint", function () { apply(choice); });
  draw();
}());
