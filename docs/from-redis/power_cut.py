"""Counts the orders of buy.lua that Redis told as queued and does not have after a crash.

    python power_cut.py everysec|always kill|power

190 clicks a second for 5 s, one after the other. `kill` is kill -9 of Redis; `power` also shuts its file system
down without flushing (EXT4_IOC_SHUTDOWN on an ext4 image, which needs root). pip install redis
"""
import fcntl, os, shutil, struct, subprocess, sys, tempfile, time
import redis

policy, cause = sys.argv[1], sys.argv[2]
port, clicks_a_second, seconds, stock = 7392, 190, 5.0, 100_000
home = tempfile.mkdtemp()
image, data = f'{home}/disk', f'{home}/data'
os.mkdir(data)

def run(*command):
    subprocess.run(command, check=True)

def start():
    server = subprocess.Popen(
        ['redis-server', '--port', str(port), '--bind', '127.0.0.1', '--dir', data, '--appendonly', 'yes',
         '--appendfsync', policy, '--save', ''], stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port, decode_responses=True)
    for _ in range(100):
        try:
            client.ping()
            return server, client
        except redis.exceptions.RedisError:
            time.sleep(0.05)
    raise SystemExit('redis-server does not answer')

if cause == 'power':
    run('dd', 'if=/dev/zero', f'of={image}', 'bs=1M', 'count=64', 'status=none')
    run('mkfs.ext4', '-q', '-F', image)
    run('mount', '-o', 'loop', image, data)
server, client = start()
client.set('stock:X', stock)
buy = client.register_script(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'buy.lua')).read())
queued, begin, n = set(), time.monotonic(), 0
while time.monotonic() - begin < seconds:
    if buy(keys=['stock:X', 'buyers:X', 'orders'], args=[f'u-{n}', n, 'X']) == 'queued':
        queued.add(n)
    n += 1
    time.sleep(max(0, begin + n / clicks_a_second - time.monotonic()))
if cause == 'power':
    folder = os.open(data, os.O_RDONLY)
    fcntl.ioctl(folder, 0x8004587D, struct.pack('I', 2))    # EXT4_IOC_SHUTDOWN, without flushing the log
    os.close(folder)
server.kill()
server.wait()
if cause == 'power':
    run('umount', data)
    run('mount', '-o', 'loop', image, data)
server, client = start()
present = {int(fields['order']) for _, fields in client.xrange('orders')}
back = int(client.get('stock:X')) - (stock - len(queued))
print(f'{policy} {cause}: queued={len(queued)} lost={len(queued - present)} units_back={back}')
server.terminate()
server.wait()
if cause == 'power':
    run('umount', data)
shutil.rmtree(home)
