//! `GET /status` of a pool: a JSON document over the smallest HTTP server that is right.
