// Does what /job.json says with the folders under /models/, and posts what came out to /result.

const WASM = new URL('/node_modules/onnxruntime-web/dist/', location.href).href;

async function main() {
  const job = await (await fetch('/job.json')).json();
  const result = { agent: navigator.userAgent };
  result.onnxruntime = await inOnnxruntime(job.onnxruntime);
  result.transformers = await inTransformers(job.transformers);
  return result;
}

// Logits of the prompt at once, then of each given token by the cache.
async function inOnnxruntime({ model, data, prompt, next }) {
  const ort = await import('onnxruntime-web/wasm');
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = WASM;
  const folder = model.slice(0, model.lastIndexOf('/') + 1);
  const externalData = data.map((path) => ({ path, data: folder + path }));
  const session = await ort.InferenceSession.create(model, { executionProviders: ['wasm'], externalData });
  const ids = (list) => new ort.Tensor('int64', BigInt64Array.from(list, BigInt), [1, list.length]);
  let cache = {};
  for (const { name, type, shape } of session.inputMetadata)
    if (name.startsWith('past_key_values.')) cache[name] = new ort.Tensor(type, [], [1, shape[1], 0, shape[3]]);
  const logits = [];
  let length = 0;
  for (const step of [prompt, ...next.map((token) => [token])]) {
    length += step.length;
    const out = await session.run({ input_ids: ids(step), attention_mask: ids(Array(length).fill(1)), ...cache });
    logits.push(...out.logits.data);
    cache = Object.fromEntries(
      Object.keys(cache).map((name) => [name, out[name.replace('past_key_values', 'present')]]),
    );
  }
  await session.release();
  return { version: ort.env.versions.web, logits };
}

// The tokens that follow a text, with nothing said but the folder's name.
async function inTransformers({ model, texts, new_tokens, conversation }) {
  const { AutoModelForCausalLM, AutoTokenizer, env } = await import('@huggingface/transformers');
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = '/models/';
  env.useBrowserCache = env.useWasmCache = false;
  env.backends.onnx.wasm.numThreads = 1;
  env.backends.onnx.wasm.wasmPaths = WASM;
  const tokenizer = await AutoTokenizer.from_pretrained(model);
  const decoder = await AutoModelForCausalLM.from_pretrained(model);
  const plain = (tensor) => Array.from(tensor.data, Number);
  const generated = [];
  for (const text of texts) {
    const inputs = tokenizer(text);
    const out = await decoder.generate({ ...inputs, max_new_tokens: new_tokens, do_sample: false });
    generated.push({ prompt: plain(inputs.input_ids), all: plain(out) });
  }
  const chat = tokenizer.apply_chat_template(conversation, { tokenize: false, add_generation_prompt: true });
  return { version: env.version, generated, chat };
}

main()
  .catch((e) => ({ error: `${e?.stack ?? e}` }))
  .then((result) => fetch('/result', { method: 'POST', body: JSON.stringify(result) }));
