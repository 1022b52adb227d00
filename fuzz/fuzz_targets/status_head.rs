//! What a stranger sends to the status port of a pool. The first two bytes say where it is cut: the answer is the same.

#![no_main]

use std::time::SystemTime;

use libfuzzer_sys::fuzz_target;
use serde_json::json;
use sock_shim::status::respond;

/// As the shim allows a head.
const MOST_BYTES: usize = 8 * 1024;

fuzz_target!(|input: &[u8]| {
    let [high, low, head @ ..] = input else {
        return;
    };
    let document = || json!({ "ready": true, "importMicros": 1 });
    let answer = |head: &[u8]| respond(head, &document, SystemTime::UNIX_EPOCH);
    let whole = answer(head);
    let cut = usize::from(u16::from_be_bytes([*high, *low])) % (head.len() + 1);
    let in_two = answer(&head[..cut]).or_else(|| answer(head));
    assert_eq!(whole, in_two);

    let Some(response) = whole else {
        assert!(head.len() < MOST_BYTES);
        return;
    };
    let mut headers = [httparse::EMPTY_HEADER; 8];
    let mut parsed = httparse::Response::new(&mut headers);
    let Ok(httparse::Status::Complete(end)) = parsed.parse(&response) else {
        panic!("{:?}", String::from_utf8_lossy(&response));
    };
    assert!(matches!(parsed.code, Some(200 | 400 | 404 | 405 | 431)));
    let length = parsed
        .headers
        .iter()
        .find(|header| header.name == "Content-Length")
        .and_then(|header| std::str::from_utf8(header.value).ok()?.parse().ok());
    let body = response.len() - end;
    let asked_for_none = head.windows(5).any(|bytes| bytes == b"HEAD ");
    assert!(length == Some(body) || (body == 0 && asked_for_none));
});
