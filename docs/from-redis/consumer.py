# The consumer group: reads the stream, inserts, acknowledges. pip install redis 'psycopg[binary]'
import os, redis, psycopg

r = redis.Redis(port=int(os.environ.get('REDIS_PORT', 6379)), decode_responses=True)
db = psycopg.connect(os.environ['SHOP_DB'], autocommit=True)

def write(f):
    with db.transaction():
        new = db.execute("INSERT INTO orders (id, user_id, sku) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
                         (f['order'], f['user'], f['sku'])).rowcount
        if new:
            db.execute("UPDATE sku SET sold = sold + 1 WHERE sku = %s", (f['sku'],))

last = '0'                                # first the entries that this consumer took and did not acknowledge
while True:
    got = r.xreadgroup('writers', 'one', {'orders': last}, count=100, block=2000)
    entries = got[0][1] if got else []
    for entry, fields in entries:
        write(fields)
        if 'DIE' in os.environ:           # to see a consumer die between insert and XACK
            os._exit(9)
        r.xack('orders', 'writers', entry)
    if last == '0' and not entries:
        last = '>'                        # then new ones
