"""Scripts that tests run inside a page: contrast of its texts, what has the focus, a file that is dropped or pasted."""

# luminance contrast (WCAG 2) of each visible text with the background that is painted below it: the three worst
CONTRAST = """() => {
  const part = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = (c) => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const pixel = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const rgba = (text) => known.get(text) || known.set(text, painted(text)).get(text);
  const painted = (text) => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = text;
    pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data];
  };
  const below = (one) => {
    for (; one; one = one.parentElement) {
      const c = rgba(getComputedStyle(one).backgroundColor);
      if (c[3] > 250) return c;
    }
    return [255, 255, 255];
  };
  const text = (one) => [...one.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const seen = (one) => one.checkVisibility({opacityProperty: true, visibilityProperty: true});
  return [...document.querySelectorAll('main *')].filter((one) => text(one) && seen(one)).map((one) => {
    const a = light(rgba(getComputedStyle(one).color)), b = light(below(one));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    return [ratio, one.className + ': ' + one.textContent.trim().slice(0, 40)];
  }).sort((a, b) => a[0] - b[0]).slice(0, 3);
}"""
DROPPED = """([way, text]) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], 'mine.jpg', {type: 'image/jpeg'}));
  const how = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
  const event = way === 'drop' ? new DragEvent('drop', how) : new ClipboardEvent('paste', how);
  document.querySelector('h1').dispatchEvent(event);
}"""
# what has the focus, and whether that is seen, at it or round it
FOCUSED = """() => {
  const one = document.activeElement;
  const ring = (each) => {
    const s = getComputedStyle(each);
    return (s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0) || s.boxShadow !== 'none';
  };
  let seen = false;
  for (let up = one, n = 0; up && n < 5; up = up.parentElement, n++) seen = seen || ring(up);
  const label = one.labels && one.labels.length ? one.labels[0].innerText.trim() : '';
  return [one.id || one.getAttribute('aria-label') || label || one.innerText.trim().split('\\n')[0], seen];
}"""
