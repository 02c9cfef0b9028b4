// Shows what the networks expected at the character under the pointer, or the one that was tapped.
const readings = JSON.parse(document.getElementById("readings").textContent);
const details = document.getElementById("details");
const shown = c => ({ "\n": "⏎", " ": "␣" })[c] ?? c;
const element = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
let chosen = null;

function show(span) {
  const [reading, place] = span.dataset.at.split(",").map(Number);
  const { total, epistemic, probability, likely } = readings[reading][place];
  chosen?.classList.remove("chosen");
  (chosen = span).classList.add("chosen");
  const of = `${total.toFixed(2)} nats total, ${Number(epistemic.toPrecision(2))} of it epistemic. Likeliest: `;
  details.replaceChildren(
    element("code", shown(span.textContent.replace("⏎\n", "\n"))),
    ` has probability ${(100 * probability).toFixed(1)} %; ${of}`,
    ...likely.flatMap(([c, p]) => [element("code", shown(c)), ` ${(100 * p).toFixed(1)} %  `]),
  );
}

for (const event of ["mouseover", "click"])
  document.addEventListener(event, ({ target }) => target.dataset?.at && show(target));
