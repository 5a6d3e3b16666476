// The place for a picture: chosen, dropped anywhere on the page, or pasted. It goes to the server inside the event.
const zone = element.querySelector('.drop');
const input = zone.querySelector('input');
const send = (file) => {
  if (!file) return;
  if (file.size > Number(zone.dataset.limit)) {
    trigger('sent', {name: file.name, size: file.size});
    return;
  }
  const reader = new FileReader();
  reader.onload = () => trigger('sent', {name: file.name, picture: reader.result.slice(reader.result.indexOf(',') + 1)});
  reader.onerror = () => trigger('sent', {name: file.name});
  reader.readAsDataURL(file);
};
input.addEventListener('change', () => { send(input.files[0]); input.value = ''; });
window.addEventListener('dragover', (event) => { event.preventDefault(); zone.classList.add('over'); });
window.addEventListener('dragleave', (event) => { if (!event.relatedTarget) zone.classList.remove('over'); });
window.addEventListener('drop', (event) => {
  event.preventDefault();
  zone.classList.remove('over');
  send(event.dataTransfer.files[0]);
});
window.addEventListener('paste', (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith('image/'));
  if (file) send(file);
});
