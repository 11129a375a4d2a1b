"""Deterministic work over much of libc: threads, children, signals, files, time, memory."""
import hashlib, json, os, re, signal, subprocess, sys, tempfile, threading, time

rows = [{"a": i, "b": str(i) * 3} for i in range(200)]
text = json.dumps(rows, sort_keys=True)
print(hashlib.sha256(text.encode()).hexdigest(), len(re.findall(r"(\d)\1\1", text)))

sums = []
threads = [
    threading.Thread(target=lambda n=n: sums.append(sum(i * i for i in range(1000 * n))))
    for n in range(8)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sorted(sums))

print(subprocess.run(["/bin/echo", "child"], capture_output=True).stdout)
print(subprocess.run("exit 9", shell=True).returncode)
print(os.system("kill -TERM $$"), os.popen("echo popen").read())
sys.stdout.flush()
child = os.fork()
if child == 0:
    print("in the child", flush=True)
    os._exit(5)
print(os.waitpid(child, 0)[1])

seen = []
signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
for _ in range(100):
    os.kill(os.getpid(), signal.SIGUSR1)
print(len(seen))
signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.05)
print(len(seen))

with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "file")
    with open(path, "w") as file:
        file.write("line\n" * 10000)
    with open(path) as file:
        print(sum(1 for _ in file), os.stat(path).st_size, os.listdir(directory))
try:
    open("/nonexistent/file")
except OSError as error:
    print(error)
print(time.strftime("%Y-%m-%d", time.gmtime(86400)), "%.17g" % 0.1, int("9" * 50) ** 3)
sys.exit(3)
