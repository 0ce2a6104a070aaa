#!/bin/sh
# The image of PostgreSQL runs this once, when it makes the cluster: Millrace's role, which is no superuser.
set -eu

# The role's password, from the URL that Millrace connects with.
password=$(sed -E 's#^postgres(ql)?://[^:]+:([^@]+)@.*$#\2#' /run/secrets/database_url)

psql --no-psqlrc --set ON_ERROR_STOP=1 --set password="$password" \
    --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE millrace LOGIN PASSWORD :'password';
ALTER DATABASE :"DBNAME" OWNER TO millrace;
-- `millrace preflight` needs these (docs/DATABASE.md, "The checks"): the first to see segments, standbys and
-- the data directory, the others for --prepare.
GRANT pg_monitor, pg_checkpoint TO millrace;
GRANT EXECUTE ON FUNCTION pg_switch_wal() TO millrace;
SQL
