//! What is mapped into this process, by `/proc/self/maps` (proc_pid_maps(5)).
//!
//! Knows nothing of Python, so that `zygote/tests/maps.rs` can run its tests.

use std::ops::Range;

/// A line of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    pub range: Range<usize>,
    pub is_written: bool,
    pub is_run: bool,
    /// Of its begin in the file, in bytes.
    pub offset: usize,
    /// Device and number of the file; `None` if it is of no file.
    pub file: Option<(String, u64)>,
    pub is_stack: bool,
}

/// All that are private and readable, by address; nothing if the list cannot be read.
pub fn private() -> Vec<Mapping> {
    let list = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    list.lines().filter_map(Mapping::parse).collect()
}

impl Mapping {
    /// `None` if it is shared, not readable, or no such line.
    fn parse(line: &str) -> Option<Mapping> {
        let mut fields = line.split_whitespace();
        let (range, access, offset) = (fields.next()?, fields.next()?, fields.next()?);
        let (device, inode) = (fields.next()?, fields.next()?.parse().ok()?);
        let name = fields.next().unwrap_or_default();
        let [b'r', writes, runs, b'p'] = *access.as_bytes() else {
            return None;
        };
        let (from, to) = range.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        Some(Mapping {
            range: number(from)?..number(to)?,
            is_written: writes == b'w',
            is_run: runs == b'x',
            offset: number(offset)?,
            file: (inode != 0).then(|| (device.to_owned(), inode)),
            is_stack: name.starts_with("[stack"),
        })
    }

    /// Whether it is private memory of no file that is written to.
    pub fn is_anonymous(&self) -> bool {
        self.is_written && !self.is_run && self.file.is_none() && !self.is_stack
    }

    /// Whether `next` begins where this ends, in memory and in their file.
    pub fn goes_on_in(&self, next: &Mapping) -> bool {
        self.range.end == next.range.start
            && self.file.is_some()
            && self.file == next.file
            && self.offset + self.range.len() == next.offset
    }
}

/// Pieces of a range that are in none of `others`, which are in order of their addresses.
pub fn without(range: &Range<usize>, others: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut pieces, mut next) = (Vec::new(), range.start);
    for other in others {
        if other.start < range.end && range.start < other.end {
            pieces.push(next..other.start);
            next = other.end;
        }
    }
    pieces.push(next..range.end);
    pieces.retain(|piece| piece.start < piece.end);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBRARY: &str = "\
7f00-8f00 r--p 00000000 fe:00 77                   /usr/lib/libc.so.6
8f00-9f00 r-xp 00001000 fe:00 77                   /usr/lib/libc.so.6
9f00-af00 r--p 00002000 fe:00 77                   /usr/lib/libc.so.6
af00-bf00 rw-p 00003000 fe:00 77                   /usr/lib/libc.so.6
bf00-cf00 rw-p 00000000 00:00 0 
cf00-df00 r-xp 00000000 00:00 0                    [vdso]";

    fn parsed(lines: &str) -> Vec<Mapping> {
        lines.lines().filter_map(Mapping::parse).collect()
    }

    #[test]
    fn a_line_is_understood() {
        let expected = Mapping {
            range: 0x8f00..0x9f00,
            is_written: false,
            is_run: true,
            offset: 0x1000,
            file: Some(("fe:00".to_owned(), 77)),
            is_stack: false,
        };
        assert_eq!(parsed(LIBRARY)[1], expected);
    }

    #[test]
    fn only_private_memory_that_can_be_read_counts() {
        for line in [
            "7f00-8f00 ---p 00000000 fe:00 77 /usr/lib/libc.so.6",
            "7f00-8f00 --xp 00000000 00:00 0 [vsyscall]",
            "7f00-8f00 rw-s 00000000 00:01 5 /memfd:x (deleted)",
            "7f00-8f00 rw-p",
            "7f00-8g00 rw-p 00000000 00:00 0",
            "nonsense",
            "",
        ] {
            assert_eq!(Mapping::parse(line), None, "{line}");
        }
    }

    #[test]
    fn only_written_memory_of_no_file_is_anonymous() {
        let anonymous: Vec<bool> = parsed(LIBRARY).iter().map(Mapping::is_anonymous).collect();
        assert_eq!(anonymous, [false, false, false, false, true, false]);
        for (line, expected) in [
            ("7f00-8f00 rw-p 00000000 00:00 0 [heap]", true),
            ("7f00-8f00 rw-p 00000000 00:00 0 [anon:arena]", true),
            ("7f00-8f00 rw-p 00000000 00:00 0 [stack]", false),
            ("7f00-8f00 rwxp 00000000 00:00 0 ", false),
        ] {
            assert_eq!(parsed(line)[0].is_anonymous(), expected, "{line}");
        }
    }

    #[test]
    fn what_is_of_others_is_left_out() {
        let others = [10..20, 30..40];
        for (range, left) in [
            (0..5, "0..5"),
            (0..50, "0..10 20..30 40..50"),
            (10..20, ""),
            (12..35, "20..30"),
            (20..30, "20..30"),
            (38..60, "40..60"),
        ] {
            let pieces = without(&range, &others);
            let pieces: Vec<String> = pieces.iter().map(|piece| format!("{piece:?}")).collect();
            assert_eq!(pieces.join(" "), left, "{range:?}");
        }
    }

    #[test]
    fn a_mapping_goes_on_where_memory_and_file_do() {
        let library = parsed(LIBRARY);
        let pairs = library.windows(2);
        let goes_on: Vec<bool> = pairs.map(|pair| pair[0].goes_on_in(&pair[1])).collect();
        assert_eq!(goes_on, [true, true, true, false, false]);
        let other = parsed("8f00-9f00 r-xp 00001000 fe:00 78 /usr/lib/other");
        let later = parsed("8f00-9f00 r-xp 00002000 fe:00 77 /usr/lib/libc.so.6");
        assert!(!library[0].goes_on_in(&other[0]) && !library[0].goes_on_in(&later[0]));
    }
}
