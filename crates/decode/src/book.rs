//! What a cache knows on the host: which sequence holds which pages, and what is free. It decides; the device is told.

use std::collections::HashMap;

use bifocal_core::{Error, Result};

use crate::Layout;

/// An entry of a page table without a page.
const NO_PAGE: u32 = u32::MAX;

/// A change to what the device knows: word `at` of the tables becomes `value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edit {
    pub(crate) at: u32,
    pub(crate) value: u32,
}

/// The first `tokens` of a page are copied to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) tokens: u32,
}

/// What the device has to do before it may be read again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Orders {
    pub(crate) edits: Vec<Edit>,
    pub(crate) copies: Vec<Copy>,
}

#[derive(Clone, Debug)]
struct Sequence {
    length: usize,
    /// Positions of a ring before this one are overwritten, sinks aside; 0 while all are there.
    kept_from: usize,
    /// Page by entry, or [`NO_PAGE`].
    table: Vec<u32>,
}

/// Sequences by slot, and pages by how many sequences hold them. Every method checks first and changes then: after an
/// error all is as before.
#[derive(Clone, Debug)]
pub(crate) struct Book {
    layout: Layout,
    slots: Vec<Option<Sequence>>,
    /// How many sequences hold a page.
    holders: Vec<u32>,
    /// Pages that nobody holds; the last is taken first.
    free: Vec<u32>,
}

impl Book {
    pub(crate) fn new(layout: Layout) -> Self {
        Self {
            layout,
            slots: vec![None; layout.sequences],
            holders: vec![0; layout.pages],
            free: (0..layout.pages as u32).rev().collect(),
        }
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn free_pages(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn free_slots(&self) -> usize {
        self.slots.iter().filter(|slot| slot.is_none()).count()
    }

    pub(crate) fn is_used(&self, slot: usize) -> bool {
        self.slots.get(slot).is_some_and(Option::is_some)
    }

    /// Tokens of the sequence in a slot that is used.
    pub(crate) fn length(&self, slot: usize) -> usize {
        self.sequence(slot).length
    }

    /// The first position of a ring that is not overwritten, sinks aside; 0 while all are there.
    pub(crate) fn kept_from(&self, slot: usize) -> usize {
        self.sequence(slot).kept_from
    }

    fn sequence(&self, slot: usize) -> &Sequence {
        self.slots[slot].as_ref().expect("a slot that is used")
    }

    /// A sequence without tokens.
    pub(crate) fn start(&mut self) -> Result<(usize, Orders)> {
        let slot = self.empty_slot()?;
        let table = vec![NO_PAGE; self.layout.entries()];
        self.slots[slot] = Some(Sequence { length: 0, kept_from: 0, table });
        let mut orders = Orders::default();
        self.tell_length(slot, &mut orders);
        Ok((slot, orders))
    }

    /// Room for `tokens` more in each of `slots`, none of which is named twice. Pages that would be written to and are
    /// shared are copied first.
    pub(crate) fn append(&mut self, slots: &[usize], tokens: usize) -> Result<Orders> {
        self.check_append(slots, tokens)?;
        let mut orders = Orders::default();
        for &slot in slots {
            for entry in self.entries_to_append(slot, tokens) {
                self.own(slot, entry, &mut orders);
            }
            let ring_tokens = self.layout.ring_tokens();
            let fixed_tokens = self.layout.fixed_tokens();
            let sequence = self.slots[slot].as_mut().expect("a slot that is used");
            sequence.length += tokens;
            if ring_tokens > 0 && sequence.length > fixed_tokens + ring_tokens {
                sequence.kept_from = sequence.kept_from.max(sequence.length - ring_tokens);
            }
            self.tell_length(slot, &mut orders);
        }
        Ok(orders)
    }

    /// Checks that there is room for `tokens` more in each of `slots`, none of which is named twice.
    pub(crate) fn check_append(&self, slots: &[usize], tokens: usize) -> Result<()> {
        let needed = self.pages_to_append(slots, tokens)?;
        match needed <= self.free.len() {
            true => Ok(()),
            false => Err(Error::CacheFull { what: "pages", needed, free: self.free.len() }),
        }
    }

    /// Notes that of a sequence the positions before `from` are not there, as if a ring had overwritten them.
    pub(crate) fn forget(&mut self, slot: usize, from: usize) {
        let sequence = self.slots[slot].as_mut().expect("a slot that is used");
        sequence.kept_from = sequence.kept_from.max(from);
    }

    /// Checks that all tokens but the first `length` can be taken back.
    pub(crate) fn check_truncate(&self, slot: usize, length: usize) -> Result<()> {
        let sequence = self.sequence(slot);
        if length > sequence.length {
            let expected = format!("at most the {} that the sequence has", sequence.length);
            return Err(Error::option("length to truncate to", length, expected));
        }
        let (kept_from, needed) = (sequence.kept_from, (length + 1).saturating_sub(self.layout.window));
        if length > 0 && needed < kept_from {
            return Err(Error::Overwritten { needed, first: kept_from });
        }
        Ok(())
    }

    /// Takes back all tokens but the first `length`.
    pub(crate) fn truncate(&mut self, slot: usize, length: usize) -> Result<Orders> {
        self.check_truncate(slot, length)?;
        let (page_size, kept_from) = (self.layout.page_size, self.kept_from(slot));
        // A ring that has gone round holds all its pages until nothing is left.
        let first = match (length, kept_from) {
            (0, _) | (_, 0) => length.div_ceil(page_size),
            _ => self.layout.entries(),
        };
        for entry in first..self.layout.entries() {
            self.release(slot, entry);
        }
        let sequence = self.slots[slot].as_mut().expect("a slot that is used");
        sequence.length = length;
        if length == 0 {
            sequence.kept_from = 0;
        }
        let mut orders = Orders::default();
        self.tell_length(slot, &mut orders);
        Ok(orders)
    }

    /// A sequence with the tokens of another, whose pages it shares.
    pub(crate) fn fork(&mut self, slot: usize) -> Result<(usize, Orders)> {
        let fork = self.empty_slot()?;
        let sequence = self.sequence(slot).clone();
        let mut orders = Orders::default();
        for (entry, &page) in sequence.table.iter().enumerate() {
            if page != NO_PAGE {
                self.holders[page as usize] += 1;
                orders.edits.push(self.edit(fork, entry, page));
            }
        }
        self.slots[fork] = Some(sequence);
        self.tell_length(fork, &mut orders);
        Ok((fork, orders))
    }

    /// Ends a sequence.
    pub(crate) fn free(&mut self, slot: usize) {
        for entry in 0..self.layout.entries() {
            self.release(slot, entry);
        }
        self.slots[slot] = None;
    }

    /// Checks that the keys from position `from` on, and the first `sinks`, are there still.
    pub(crate) fn check_kept(&self, slot: usize, sinks: usize, from: usize) -> Result<()> {
        let first = self.sequence(slot).kept_from;
        if first > 0 && from < first {
            return Err(Error::Overwritten { needed: from, first });
        }
        if first > 0 && sinks > self.layout.fixed_tokens() {
            return Err(Error::Overwritten { needed: self.layout.fixed_tokens(), first });
        }
        Ok(())
    }

    /// How many free pages an append takes.
    fn pages_to_append(&self, slots: &[usize], tokens: usize) -> Result<usize> {
        let limit = self.layout.capacity;
        let mut needed = 0;
        // A page that two of the sequences share and both write to is copied once: the last holder keeps it.
        let mut left: HashMap<u32, u32> = HashMap::new();
        for (at, &slot) in slots.iter().enumerate() {
            if slots[..at].contains(&slot) {
                return Err(Error::option("a batch to append to", "one with a sequence twice", "each once"));
            }
            let sequence = self.sequence(slot);
            let size = sequence.length.saturating_add(tokens);
            if size > limit {
                let (size, limit) = (size as u128, limit as u128);
                return Err(Error::TooLarge { what: "tokens in a sequence of the cache", size, limit });
            }
            for entry in self.entries_to_append(slot, tokens) {
                let page = sequence.table[entry];
                if page == NO_PAGE {
                    needed += 1;
                    continue;
                }
                let holders = left.entry(page).or_insert(self.holders[page as usize]);
                if *holders > 1 {
                    *holders -= 1;
                    needed += 1;
                }
            }
        }
        Ok(needed)
    }

    /// The entries of the page table that `tokens` more are written to, each once.
    fn entries_to_append(&self, slot: usize, tokens: usize) -> Vec<usize> {
        let Layout { page_size, .. } = self.layout;
        let length = self.sequence(slot).length;
        let mut entries: Vec<usize> = Vec::new();
        // What a ring would overwrite at once is not written.
        for page in length / page_size..(length + tokens).div_ceil(page_size) {
            if entries.len() == self.layout.entries() {
                break;
            }
            let entry = self.layout.entry(page * page_size);
            if self.layout.ring_pages == 0 || !entries.contains(&entry) {
                entries.push(entry);
            }
        }
        entries
    }

    /// Makes a slot the one holder of the page of an entry.
    fn own(&mut self, slot: usize, entry: usize, orders: &mut Orders) {
        let Sequence { length, kept_from, ref table } = *self.sequence(slot);
        let old = table[entry];
        if old != NO_PAGE && self.holders[old as usize] == 1 {
            return;
        }
        let page = self.free.pop().expect("pages were counted");
        self.holders[page as usize] = 1;
        if old != NO_PAGE {
            let Layout { page_size, .. } = self.layout;
            let written = match kept_from {
                0 => length.saturating_sub(entry * page_size).min(page_size),
                _ => page_size,
            };
            orders.copies.push(Copy { from: old, to: page, tokens: written as u32 });
            self.holders[old as usize] -= 1;
        }
        orders.edits.push(self.edit(slot, entry, page));
        self.slots[slot].as_mut().expect("a slot that is used").table[entry] = page;
    }

    /// Lets go of the page of an entry, if there is one.
    fn release(&mut self, slot: usize, entry: usize) {
        let sequence = self.slots[slot].as_mut().expect("a slot that is used");
        let page = std::mem::replace(&mut sequence.table[entry], NO_PAGE);
        if page != NO_PAGE {
            self.holders[page as usize] -= 1;
            if self.holders[page as usize] == 0 {
                self.free.push(page);
            }
        }
    }

    fn empty_slot(&self) -> Result<usize> {
        let slot = self.slots.iter().position(Option::is_none);
        slot.ok_or(Error::CacheFull { what: "sequences", needed: 1, free: 0 })
    }

    fn edit(&self, slot: usize, entry: usize, page: u32) -> Edit {
        Edit { at: (slot * self.layout.pitch() + 1 + entry) as u32, value: page }
    }

    fn tell_length(&self, slot: usize, orders: &mut Orders) {
        let at = (slot * self.layout.pitch()) as u32;
        orders.edits.push(Edit { at, value: self.length(slot) as u32 });
    }
}

#[cfg(test)]
mod tests {
    use bifocal_core::Window;

    use super::*;

    fn paged() -> Book {
        Book::new(Layout::paged(3, 12, 4, 6).unwrap())
    }

    #[test]
    fn a_page_that_is_shared_is_copied_by_all_who_write_but_the_last() {
        let mut book = paged();
        let (first, _) = book.start().unwrap();
        book.append(&[first], 6).unwrap();
        let (second, _) = book.fork(first).unwrap();
        assert_eq!(book.free_pages(), 4);
        let orders = book.append(&[second, first], 1).unwrap();
        assert_eq!(orders.copies.len(), 1);
        assert_eq!(orders.copies[0].tokens, 2);
        assert_eq!(book.free_pages(), 3);
        book.free(first);
        book.free(second);
        assert_eq!((book.free_pages(), book.free_slots()), (6, 3));
    }

    #[test]
    fn an_error_leaves_everything_as_it_was() {
        let mut book = paged();
        let (first, _) = book.start().unwrap();
        let (second, _) = book.start().unwrap();
        book.append(&[first, second], 12).unwrap();
        let (third, _) = book.start().unwrap();
        let before = format!("{book:?}");
        let full = book.append(&[third], 1).unwrap_err();
        assert_eq!(full, Error::CacheFull { what: "pages", needed: 1, free: 0 });
        assert!(matches!(book.append(&[first], 1), Err(Error::TooLarge { size: 13, limit: 12, .. })));
        assert!(matches!(book.append(&[third, third], 0), Err(Error::Option { .. })));
        assert!(matches!(book.truncate(first, 13), Err(Error::Option { .. })));
        assert!(matches!(book.fork(first), Err(Error::CacheFull { what: "sequences", .. })));
        assert_eq!(format!("{book:?}"), before);
    }

    #[test]
    fn a_ring_holds_its_pages_and_no_more() {
        let window = Window::new(6).unwrap();
        let layout = Layout::ring(2, window, 3, 4).unwrap().with_sinks(2).unwrap();
        assert_eq!((layout.pages(), layout.tokens_kept()), (8, 16));
        let mut book = Book::new(layout);
        let (slot, _) = book.start().unwrap();
        for _ in 0..50 {
            book.append(&[slot], 3).unwrap();
        }
        assert_eq!(book.free_pages(), 4);
        // 150 tokens, of which the last 12 and the first 4 are there.
        assert!(book.check_kept(slot, 4, 138).is_ok());
        assert_eq!(book.check_kept(slot, 0, 137), Err(Error::Overwritten { needed: 137, first: 138 }));
        assert!(book.check_kept(slot, 5, 140).is_err());
        // The next token of 144 would see 139 to 144; of 142, 137 to 142.
        assert!(book.truncate(slot, 142).is_err());
        assert!(book.truncate(slot, 144).is_ok());
        assert_eq!(book.free_pages(), 4);
        book.truncate(slot, 0).unwrap();
        assert_eq!(book.free_pages(), 8);
    }

    #[test]
    fn layouts_refuse_what_makes_no_sense() {
        let window = Window::new(8).unwrap();
        assert!(matches!(Layout::contiguous(0, 8), Err(Error::EmptyDimension { .. })));
        assert!(matches!(Layout::contiguous(1, 0), Err(Error::EmptyDimension { .. })));
        assert!(matches!(Layout::contiguous(1, usize::MAX), Err(Error::TooLarge { .. })));
        for page_size in [0, 257] {
            assert!(matches!(Layout::paged(1, 8, page_size, 8), Err(Error::Option { .. })));
            assert!(matches!(Layout::ring(1, window, 0, page_size), Err(Error::Option { .. })));
        }
        assert!(Layout::paged(1, 8, 4, 2).unwrap().with_sinks(4).is_err());
        assert!(Layout::ring(1, window, usize::MAX, 4).is_err());
    }
}
