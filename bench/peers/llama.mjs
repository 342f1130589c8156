// One process of bench/peers/llama.py: llama.cpp, through node-llama-cpp, on a text of one token a byte.
//   node llama.mjs MODULES MODEL TEXT STATE TOKENS THREADS GENERATE read|resume
// read: evaluates the text, saves the state, generates. resume: loads the state in a new process and generates.
// Prints one line of JSON; times count from the begin of the process, memory is /proc's.
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [modules, modelPath, textPath, statePath, size, threads, generate, what] = process.argv.slice(2);
const began = performance.timeOrigin;
const now = () => (Date.now() - began) / 1000;
const {getLlama} = await import(pathToFileURL(path.join(modules, "node-llama-cpp", "dist", "index.js")).href);
const llama = await getLlama({gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error"});
const memory = name => 1024 * Number(new RegExp(name + ":\\s+(\\d+)").exec(fs.readFileSync("/proc/self/status", "utf8"))[1]);
const runtime_rss_bytes = memory("VmRSS"); // node's own, before there is a model
const model = await llama.loadModel({modelPath});
// Room for the text and what is generated; f16 keys and values, as our store has.
const context = await model.createContext({contextSize: Number(size) + 512, batchSize: 512, threads: Number(threads)});
const sequence = context.getSequence();
const answer = {loaded: now(), runtime_rss_bytes};
// Our byte models have one token a byte. llama.cpp's tokenizer would write a space as the three bytes of U+2581.
const byte0 = model.tokenize("A").at(-1) - 65;
if (model.tokenize("Z").at(-1) !== byte0 + 90) throw new Error(`${modelPath} is not a model of bytes`);
const tokens_of = bytes => Array.from(bytes, b => byte0 + b);
const question = tokens_of(Buffer.from("\nWhat is the pass key? The pass key is "));
if (what === "read") {
    const tokens = [model.tokens.bos, ...tokens_of(fs.readFileSync(textPath))];
    answer.tokens = tokens.length;
    const t = now();
    await sequence.evaluateWithoutGeneratingNewTokens(tokens);
    answer.read_seconds = now() - t;
    const u = now();
    answer.state_bytes = (await sequence.saveStateToFile(statePath)).fileSize;
    answer.save_seconds = now() - u;
} else {
    await sequence.loadStateFromFile(statePath, {acceptRisk: true});
    answer.tokens = sequence.nextTokenIndex;
    answer.state_loaded = now();
}
const times = [];
for await (const _ of sequence.evaluate(question, {temperature: 0})) {
    times.push(now());
    if (times.length >= Number(generate)) break;
}
answer.first_token_seconds = times[0]; // since the process began
answer.generated = times.length;
const steps = times.slice(1).map((x, i) => x - times[i]).sort((a, b) => a - b);
answer.token_milliseconds = steps.length ? 1000 * (times.at(-1) - times[0]) / steps.length : null;
answer.peak_rss_bytes = memory("VmHWM");
console.log(JSON.stringify(answer));
process.exit(0);
