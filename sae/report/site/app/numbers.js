// numbers (as numbers.py writes them)

function decimal(value, digits = 3) {
  if (value == null || !Number.isFinite(value)) return "n/a";
  if (value === 0) return "0";
  const size = Number(Math.abs(value).toExponential(digits - 1).split("e")[1]);
  if (size >= digits) return count(Math.round(value));
  if (size < -4) return value.toExponential(digits - 1);
  const text = value.toFixed(Math.max(0, digits - 1 - size));
  return Math.abs(value) < 1 ? text.replace(/^(-?)0\./, "$1.") : text;
}

const percent = (share) => (Number.isFinite(share) ? `${decimal(100 * share)} %` : "n/a");
const count = (n) => n.toLocaleString("en-US");

/** Two digits, for shares in narrow places. */
function short2(value) {
  return decimal(value, 2);
}
