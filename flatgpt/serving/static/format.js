// Numbers as people read them.

/** 1234567 -> "1.23M". */
export function short(value) {
  if (value == null) return "–";
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= 0.9995 * size) return `${Number((value / size).toPrecision(3))}${unit}`;
  }
  return `${Number(value.toPrecision(3))}`;
}

export function fixed(value, digits) {
  return value == null ? "–" : value.toFixed(digits);
}

/** A number in four digits. */
export function significant(value) {
  return `${Number(value.toPrecision(4))}`;
}

export function whole(value) {
  return value == null ? "–" : Math.round(value).toLocaleString("en");
}

/** Seconds in their two largest units: "2 h 05 min". */
export function duration(seconds) {
  if (seconds == null) return "–";
  const units = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]];
  for (const [size, unit, smaller, part] of units) {
    if (seconds < size) continue;
    const rest = Math.floor((seconds % size) / smaller);
    return `${Math.floor(seconds / size)}\u00a0${unit} ${String(rest).padStart(2, "0")}\u00a0${part}`;
  }
  return `${Math.floor(seconds)}\u00a0s`;
}
