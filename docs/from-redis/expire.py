# The delayed task: unpaid orders end, and their units go back to Redis.
import os, redis, psycopg

r = redis.Redis(port=int(os.environ.get('REDIS_PORT', 6379)))
db = psycopg.connect(os.environ['SHOP_DB'], autocommit=True)

with db.transaction():
    gone = db.execute("""UPDATE orders SET status = 'expired' WHERE status = 'unpaid'
                         AND created_at < now() - interval '15 minutes' RETURNING sku, user_id""").fetchall()
    for sku, _ in gone:
        db.execute("UPDATE sku SET sold = sold - 1 WHERE sku = %s", (sku,))
for sku, user in gone:                    # a crash here: the database has the units back, Redis has not
    r.incr(f'stock:{sku}')
    r.srem(f'buyers:{sku}', user)
