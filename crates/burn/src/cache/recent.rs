use burn::tensor::Tensor;

/// The last tokens of a tensor `[B, Hk, T, D]` that grows: as many as a window has.
#[derive(Debug)]
pub(super) struct Recent {
    window: usize,
    tokens: Option<Tensor<4>>,
}

impl Recent {
    pub(super) fn new(window: usize) -> Self {
        Self { window, tokens: None }
    }

    /// What is there, and `new` after it.
    pub(super) fn followed_by(&self, new: Tensor<4>) -> Tensor<4> {
        match &self.tokens {
            Some(tokens) => Tensor::cat(vec![tokens.clone(), new], 2),
            None => new,
        }
    }

    /// The token that the next one pushes out of the window, if the window is full.
    pub(super) fn leaving(&self) -> Option<Tensor<4>> {
        let tokens = self.tokens.as_ref().filter(|tokens| tokens.dims()[2] == self.window)?;
        Some(tokens.clone().narrow(2, 0, 1))
    }

    /// Keeps the last tokens of `all`.
    pub(super) fn keep(&mut self, all: Tensor<4>) {
        let [_, _, tokens, _] = all.dims();
        let kept = tokens.min(self.window);
        self.tokens = Some(all.narrow(2, tokens - kept, kept));
    }

    pub(super) fn bytes(&self) -> usize {
        let bytes = |tokens: &Tensor<4>| tokens.dims().iter().product::<usize>() * tokens.dtype().size();
        self.tokens.as_ref().map_or(0, bytes)
    }
}
